"""The pictures of `make book`: new images by the model it trained, by the one that ships, and real ones beside them.

    python tools/book_pictures.py --model out/first_model    writes out/samples.png and out/film.gif
    python tools/book_pictures.py --closing                  says what `make book` has made
"""
import argparse, json
from pathlib import Path

OUT = Path("out")

def walk(denoise, n: int, steps: int, seed: int, says: str) -> list:
    "Noise and every frame after it, by ancestral sampling."
    import torch
    from tqdm import tqdm
    from diffusion_book.sampling import ddpm
    where = next(denoise.net.parameters()).device
    generator = torch.Generator(where).manual_seed(seed)
    x = torch.randn(n, 1, 28, 28, generator=generator, device=where)
    moves = ddpm(denoise, x, denoise.schedule, denoise.schedule.times(steps), generator=generator)
    with torch.no_grad(): return [x.cpu()] + [s.x.cpu() for s in tqdm(moves, total=steps, desc=says, unit="step")]

def titled_sheets(sheets: dict, scale: int = 3):
    "Contact sheets side by side, each under its title, as one picture."
    from PIL import Image, ImageDraw, ImageFont
    from diffusion_book.pictures import image_grid, to_uint8
    font, gap, top = ImageFont.load_default(size=22), 36, 44
    pages = [Image.fromarray(to_uint8(image_grid(x)).squeeze(0).numpy()) for x in sheets.values()]
    pages = [p.resize((p.width*scale, p.height*scale), Image.NEAREST) for p in pages]
    whole = Image.new("L", (sum(p.width for p in pages) + gap*(len(pages) + 1), pages[0].height + top + gap), 255)
    x = gap
    for title, page in zip(sheets, pages):
        ImageDraw.Draw(whole).text((x + page.width/2, top/2), title, fill=0, font=font, anchor="mm")
        whole.paste(page, (x, top))
        x += page.width + gap
    return whole

def side_by_side(left, right, n: int = 16, gap: int = 12):
    "One frame of the film: a sheet of `n` images by each model."
    import torch
    from diffusion_book.pictures import image_grid
    a, b = image_grid(left[:n].clamp(-1, 1)), image_grid(right[:n].clamp(-1, 1))
    return torch.cat([a, torch.ones(1, a.shape[1], gap), b], dim=2)

def draw(folder: Path, n: int = 64, steps: int = 100, seed: int = 0):
    "Write the sheets and the film."
    from diffusion_book.pictures import film, load_fashion
    from diffusion_book.training import load_model, load_pretrained
    mine = walk(load_model(folder), n, steps, seed, "your model       ")
    ships = walk(load_pretrained("fashion"), n, steps, seed, "the one that ships")
    real, _ = load_fashion("test")
    OUT.mkdir(exist_ok=True)
    titled_sheets({"by your model": mine[-1], "by the model that ships": ships[-1], "real": real[::len(real)//n][:n]}).save(OUT/"samples.png")
    (OUT/"film.gif").write_bytes(film([side_by_side(a, b) for a, b in zip(mine[::4], ships[::4])]))

def closing(folder: Path) -> str:
    "What was made, and how to look at it."
    card = json.loads((folder/"card.json").read_text())
    pages = len(list(Path("_docs").glob("*.html")))
    return "\n".join(["", "Made:",
        f"  {folder}/  your model: {card['parameters']:,} weights, {card['steps']:,} updates in {card['seconds']:.0f} s on {card['device']}",
        f"  {OUT}/samples.png   64 new images by it, 64 by the model that ships, 64 real ones",
        f"  {OUT}/film.gif      noise turning into garments, your model on the left",
        f"  _docs/            the book, {pages} pages", "",
        "Look: open the pictures, and `make serve` for the book."])

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=OUT/"first_model", help="folder of the trained model")
    ap.add_argument("--closing", action="store_true", help="only say what was made")
    args = ap.parse_args()
    if args.closing: print(closing(args.model))
    else: draw(args.model)
