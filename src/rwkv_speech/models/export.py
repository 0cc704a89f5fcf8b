"""`python -m rwkv_speech.models.export RUN FILE.pth`: a checkpoint in the layout of the published adapter files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.errors import exit_code
from rwkv_speech.models.checkpoint import export_published, find_checkpoint, load_trained


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_speech.models.export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("file", type=Path, help="the .pth file to write")
    args = parser.parse_args(argv)

    def export() -> None:
        export_published(load_trained(find_checkpoint(args.run)), args.file)
        print(f"written to {args.file}")

    return exit_code(export)


if __name__ == "__main__":
    sys.exit(main())
