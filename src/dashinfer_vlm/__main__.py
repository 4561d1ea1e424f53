"""`python -m dashinfer_vlm` is `dashinfer-vlm`."""

from __future__ import annotations

from dashinfer_vlm.cli.tool import main

if __name__ == "__main__":
    main()
