"""sparsegraph: an export-time compiler for sparse and masked neural networks."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "passes" / "__init__.py").exists():  # a bare checkout: the two siblings are ours
    __path__.append(str(_ROOT))
