"What a figure was measured on, and how results are stored."
import json, os, platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = "torch", "numpy", "diffusers", "denoising-diffusion-pytorch", "smalldiffusion"

def machine() -> dict:
    "Processor, cores, load, threads and versions: a figure says nothing without them."
    import torch
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((l.split(":", 1)[1].strip() for l in info.read_text().splitlines() if l.startswith("model name")), model)
    flags = info.read_text() if info.exists() else ""
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    return dict(cpu=model, cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2), avx512=" avx512f" in flags,
                wait_policy=os.environ.get("OMP_WAIT_POLICY", "default"), python=platform.python_version(),
                versions={p: v for p in PACKAGES if (v := installed(p))})

def write_json(path: Path, result: dict) -> None:
    "Store a result, whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
    print(f"written to {path}")
