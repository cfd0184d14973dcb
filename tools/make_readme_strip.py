"""Draw the README's picture, `nbs/images/strip.png`: noise turning to garments, by the model that ships.

`python tools/make_readme_strip.py`. Each row is one image at ten times, from pure noise on the left to the garment on the right;
the times are even in log-SNR, where the garment takes shape. The same weights give the same picture.
"""
import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusion_book.pictures import image_grid, to_uint8
from diffusion_book.sampling import ddpm
from diffusion_book.training import load_pretrained

OUT = Path(__file__).resolve().parents[1]/"nbs"/"images"/"strip.png"

@torch.no_grad()
def strip(seed: int, rows: int, columns: int = 10, steps: int = 250) -> torch.Tensor:
    "Frames of `rows` images, shape (rows*columns, 1, 28, 28), row by row."
    denoise = load_pretrained("fashion", device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 28, 28, generator=generator)
    frames, logsnr = [x], []
    for step in ddpm(denoise, x, denoise.schedule, denoise.schedule.times(steps), generator=generator):
        frames.append(step.x)
        logsnr.append(float(denoise.schedule.logsnr(step.t)))
    logsnr = torch.tensor(logsnr[:-1])   # the last is infinite
    wanted = torch.linspace(-3, 5, columns - 2)
    picked = [0, *(1 + (logsnr - w).abs().argmin().item() for w in wanted), len(frames) - 1]
    return torch.stack([frames[i] for i in picked], 1).flatten(0, 1).clamp(-1, 1)

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seed", type=int, default=3)
    ap.add_argument("--rows", type=int, default=4)
    ap.add_argument("--out", type=Path, default=OUT)
    args = ap.parse_args()
    sheet = Image.fromarray(to_uint8(image_grid(strip(args.seed, args.rows), 10)).squeeze(0).numpy())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width*3, sheet.height*3), Image.NEAREST).save(args.out, optimize=True)
    print(f"{args.out.name}: {args.out.stat().st_size:,} bytes")
