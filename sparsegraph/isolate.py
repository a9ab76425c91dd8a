"""Run onnx's C++ checker, version converter and shape inference in a child process.

They crash or loop on some damaged models (stack overflow, unbounded data propagation), so a model
that we did not make goes through them under a time and memory limit. This file is also the child's
program: `python -P isolate.py <steps>`, a serialised model on stdin, the result on stdout.
"""

import subprocess
import sys

TIME_LIMIT_S = 120.0
MEMORY_LIMIT_BYTES = 8 << 30


class ChildError(Exception):
    """The child refused the model, crashed, or ran out of time; the text says which."""


def run(steps: str, model: bytes, time_limit_s: float = TIME_LIMIT_S) -> bytes:
    """Apply comma-separated steps (`check`, `infer`, `convert:23`) to a serialised model.

    Raises ChildError with one line of reason.
    """
    command = [sys.executable, "-P", __file__, steps]
    try:
        done = subprocess.run(
            command, input=model, capture_output=True, timeout=time_limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"no result after {time_limit_s:g} s") from error
    if done.returncode < 0:
        raise ChildError(f"the ONNX library crashed with signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ChildError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout


def _apply(step: str, model: bytes) -> bytes:
    import onnx
    from onnx import checker, shape_inference, version_converter

    proto = onnx.load_model_from_string(model)
    name, _, argument = step.partition(":")
    if name == "check":
        whole = onnx.load_model_from_string(model)
        for value in whole.graph.output:  # ONNX Runtime accepts outputs without a shape, so do we
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
        checker.check_model(whole)
    elif name == "infer":
        proto = shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
    elif name == "convert":
        proto = version_converter.convert_version(proto, int(argument))
    else:
        raise ValueError(f"unknown step {step}")
    return bytes(proto.SerializeToString())


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows: the time limit still holds
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def _child(steps: str) -> None:
    _limit_memory()
    model = sys.stdin.buffer.read()
    try:
        for step in steps.split(","):
            model = _apply(step, model)
    except Exception as error:  # one line for the parent, whatever the library raises
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(text[:600])
        sys.exit(1)
    sys.stdout.buffer.write(model)


if __name__ == "__main__":
    _child(sys.argv[1])
