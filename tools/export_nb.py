"Export some notebooks to their modules: `python tools/export_nb.py nbs/12_forward.ipynb ...` (`make export` does all of them)."
import sys
from nbdev.export import nb_export
for path in sys.argv[1:]: nb_export(path)
