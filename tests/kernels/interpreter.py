"""Makes Triton's interpreter compute as the compiler's code does, where it (3.6.0) does not. Tests only."""

import numpy as np
import torch


def repair() -> None:
    """Repair four faults in this process: bfloat16 operands of `tl.dot` are multiplied as integers, float32 is truncated to bfloat16 and not
    rounded, loops over run-time ranges fail with numpy 2.4, and every call of a function within a kernel patches the whole language again, which
    takes nearly all of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, *rest):
        return plain_dot(self, widened(a), widened(b), d, *rest)

    def cast(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(rounded.reshape(source.data.shape), tl.bfloat16)
        return plain_cast(self, source, kind)

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def launch(self, *args, **kwargs):
        patched.clear()
        return plain_launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        modules = frozenset(name for name, value in self.fn.__globals__.items() if value is tl or value is tl.core)
        if modules not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*args, **kwargs)

    patched: set[frozenset] = set()  # by the launch that is running
    plain_dot, plain_cast, plain_patch, plain_launch = (
        interpreter.InterpreterBuilder.create_dot,
        interpreter.InterpreterBuilder.cast_impl,
        interpreter._patch_lang_tensor,
        interpreter.GridExecutor.__call__,
    )
    if plain_dot.__module__ != __name__:  # not yet repaired
        interpreter.InterpreterBuilder.create_dot = dot
        interpreter.InterpreterBuilder.cast_impl = cast
        interpreter._patch_lang_tensor = patch
        interpreter.GridExecutor.__call__ = launch
        interpreter.InterpretedFunction.__call__ = call
