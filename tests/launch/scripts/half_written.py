"""Begins to write rows and a model into a folder, says "ready", and waits to be killed: half_written.py FOLDER"""

import sys
import time
from pathlib import Path

from utils.model.saving import atomic_folder
from utils.process.files import scratch_beside

target = Path(sys.argv[1])
with scratch_beside(target / "rows.arrow") as scratch, atomic_folder(target / "model") as folder:
    scratch.write_text("half")
    (folder / "model.safetensors").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
