"""Make the data that ships in the package: `python tools/make_data.py FOLDER`.

FOLDER holds the four original files of Fashion-MNIST (train-images-idx3-ubyte.gz and so on), from its
authors or from Debian's package `dataset-fashion-mnist`. Their gzip headers differ, their pixels do not:
so it is the decoded bytes that are checked. From train the first 1,000 images of each class are kept,
from test the first 200 of each, both in file order. The same input gives the same file, byte for byte.
"""
import argparse, gzip, hashlib, io, struct, zipfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[1]/"diffusion_book"/"data"/"fashion_mnist.npz"

DECODED = {  # sha256 of each original file after gunzip
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}

KEPT = {  # sha256 of each embedded array's bytes
    "train_images": "e1427044c614fabc29feeff0f27e6b68f88a9ee2f2cfe7d783b9157159864883",
    "train_labels": "2c02745d4ad8b4511333d0eca662ac5664a371860abaa4588b1670e7be59fbdf",
    "test_images": "96315b1732ab731e68b8def3c284f34b605f7deb7a61e683c7d786265c827c83",
    "test_labels": "b2095bc797d1201e84da76c94012c02d0e6f07af0938df4e00120a3b42d1aa4c"}

def sha256(data: bytes) -> str: return hashlib.sha256(data).hexdigest()

def read_idx(folder: Path, name: str) -> np.ndarray:
    "Decode one IDX file: two zero bytes, type 8 (uint8), number of axes, their lengths, then the values."
    path = folder/f"{name}.gz"
    if not path.exists(): raise SystemExit(f"{path} is missing: the four original .gz files must be in one folder")
    data = gzip.decompress(path.read_bytes())
    if sha256(data) != DECODED[name]: raise SystemExit(f"{path} decodes to {sha256(data)}, not to {DECODED[name]}")
    _, kind, axes = struct.unpack(">HBB", data[:4])
    assert kind == 8, f"{path}: type {kind:#x}, not uint8"
    shape = struct.unpack(f">{axes}I", data[4:4 + 4*axes])
    return np.frombuffer(data, np.uint8, offset=4 + 4*axes).reshape(shape)

def first_of_each(labels: np.ndarray, n: int) -> np.ndarray:
    "Indices, in file order, of the first `n` images of each of the ten classes."
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:n] for c in range(10)]))

def subset(folder: Path) -> dict:
    "The four arrays that ship, checked."
    arrays = {}
    for ours, theirs, n in [("train", "train", 1000), ("test", "t10k", 200)]:
        images, labels = read_idx(folder, f"{theirs}-images-idx3-ubyte"), read_idx(folder, f"{theirs}-labels-idx1-ubyte")
        idx = first_of_each(labels, n)
        arrays[f"{ours}_images"], arrays[f"{ours}_labels"] = images[idx], labels[idx]
    for k, v in arrays.items():
        if sha256(v.tobytes()) != KEPT[k]: raise SystemExit(f"{k}: {sha256(v.tobytes())}, not {KEPT[k]}")
    return arrays

def save_npz(path: Path, arrays: dict):
    "What `np.savez_compressed` writes, with a fixed date and order, so that equal arrays make equal files."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for k, v in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(v), version=(1, 0), allow_pickle=False)
            z.writestr(zipfile.ZipInfo(f"{k}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(),
                       compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path, help="folder with the four original .gz files")
    ap.add_argument("--out", type=Path, default=OUT, help="the .npz to write")
    args = ap.parse_args()
    save_npz(args.out, subset(args.folder))
    print(f"{args.out.name}: {args.out.stat().st_size:,} bytes, sha256 {sha256(args.out.read_bytes())}")
