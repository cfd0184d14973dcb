"""Run notebooks in place and keep their outputs and times: `python tools/execute_nb.py nbs/12_forward.ipynb ...`

Each notebook runs in a process of its own, as it does for a reader. Cells marked `#| eval: false`, `#| notest`
or `#| slow` are not run and keep their outputs (`--flags slow` runs the slow ones). With `--times FILE` the seconds
of each chapter, imports included, are written into that JSON file, and their sum into the README.
"""
import argparse, json, os, platform, re, resource, subprocess, sys, time
from pathlib import Path

def skipper(run_anyway: list):
    "A function that says which cells are not to be run."
    from nbdev.config import get_config
    marks = [r"eval:\s*false", *(set(get_config().tst_flags.split()) - set(run_anyway))]
    def skipped(cell):
        if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source: return True
        return any(re.search(rf"^#\|\s*{m}\s*$", cell.source, re.M) for m in marks)
    return skipped

def tidy(output):
    "A progress bar overwrites itself with carriage returns: keep what a terminal shows in the end."
    if output.get("output_type") == "stream":
        text = "".join(output["text"]).replace("\r\n", "\n")
        lines = [part.rstrip("\r").split("\r")[-1] for part in text.split("\n")]
        output["text"] = "\n".join(lines).splitlines(keepends=True)
    return output

def execute(path: Path, flags: list):
    "Run one notebook here and write it back with its new outputs."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    nb, shell, skipped = read_nb(path), CaptureShell(path, mpl_format="png"), skipper(flags)
    shell.set_path(path.parent.resolve())
    for cell in nb.cells:
        if not skipped(cell): cell.outputs = []   # so that nothing stale stays
    try: shell.run_all(nb, exc_stop=True, preproc=skipped)
    except Exception: sys.exit(f"{path}\n{shell.prettytb(fname=path)}")
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [tidy(o) for o in cell.outputs]
    clean_nb(nb, clean_ids=True)
    write_nb(nb, path)

def machine() -> dict:
    "What the times were taken on."
    from importlib.metadata import version
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((l.split(":", 1)[1].strip() for l in info.read_text().splitlines() if l.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(cpu=model, cores=cores, python=platform.python_version(), torch=version("torch"),
                scale=os.environ.get("DIFFUSION_BOOK_SCALE", "laptop"))

def table(times: dict) -> str:
    "The times as text, in the order of the chapters."
    rows = [f"{name:<24}{t['seconds']:>9.1f}{t['cpu_seconds']:>13.1f}" for name, t in times.items()]
    total = f"{'all':<24}{sum(t['seconds'] for t in times.values()):>9.1f}{sum(t['cpu_seconds'] for t in times.values()):>13.1f}"
    return "\n".join([f"{'chapter':<24}{'seconds':>9}{'cpu seconds':>13}", *rows, total])

MARK = re.compile(r"(<!-- times -->).*?(<!-- /times -->)", re.S)

def sentence(stored: dict) -> str:
    "The table in one sentence, for the README."
    seconds, m = {k: v["seconds"] for k, v in stored["chapters"].items()}, stored["machine"]
    longest = max(seconds, key=seconds.get)
    return (f"One after another the {len(seconds)} notebooks run in {sum(seconds.values())/60:.1f} minutes on {m['cores']} cores "
            f"({m['cpu']}); the longest, `{longest}`, takes {seconds[longest]:.0f} seconds.")

def tell_readme(readme: Path, stored: dict):
    "Put the sentence between the README's marks."
    if readme.exists(): readme.write_text(MARK.sub(lambda m: m[1] + sentence(stored) + m[2], readme.read_text(encoding="utf-8")), encoding="utf-8")

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("paths", nargs="+", type=Path, help="notebooks")
    ap.add_argument("--flags", default="", help="test flags to run anyway, such as 'slow'")
    ap.add_argument("--times", type=Path, help="JSON file to put the times in")
    ap.add_argument("--here", action="store_true", help="run in this process (what the others are started with)")
    args = ap.parse_args()
    if args.here:
        for path in args.paths: execute(path, args.flags.split())
        return
    times = {}
    for path in args.paths:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        rc = subprocess.run([sys.executable, __file__, str(path), "--here", "--flags", args.flags], stdin=subprocess.DEVNULL).returncode
        if rc: sys.exit(rc)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times[path.stem] = dict(seconds=round(time.perf_counter() - start, 1), cpu_seconds=round(cpu, 1))
        print(f"ran {path}: {times[path.stem]['seconds']:.1f} s ({cpu:.1f} s of computing)", flush=True)
        if args.times:   # after each, so that a stop loses nothing
            old = json.loads(args.times.read_text()) if args.times.exists() else {}
            chapters = {**old.get("chapters", {}), **times}
            there = {p.stem for p in path.parent.glob("*.ipynb")}
            order = sorted((k for k in chapters if k in there), key=lambda k: (k != "index", k))
            stored = dict(machine=machine(), chapters={k: chapters[k] for k in order})
            args.times.write_text(json.dumps(stored, indent=1) + "\n")
            tell_readme(args.times.resolve().parents[1]/"README.md", stored)
    if len(times) > 1: print("\n" + table(times))
    if args.times: print(f"\nwritten to {args.times}")

if __name__ == "__main__": main()
