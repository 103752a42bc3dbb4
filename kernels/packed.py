"""Linear layers with frozen weights on the CPU in C++ (csrc/cpu/linear.cpp): the weight is packed once for each direction, in the order in which the
product reads it, and bias, residual, layer scale, activation and its derivative are applied while the result is in the cache. float32."""

import ctypes

import torch
from smi.csrc import host
from torch import Tensor

EPILOGUES = ("none", "residual", "activation", "slope")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


class Params(ctypes.Structure):
    """As in csrc/cpu/linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "residual", "gamma", "h", "y")),
        *((name, ctypes.c_int64) for name in ("m", "k", "n", "ldx")),
        *((name, ctypes.c_int32) for name in ("epilogue", "activation")),
    ]


def unsupported(weight: Tensor) -> str | None:
    """Why a weight cannot be packed; None if it can."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it takes float32 on the CPU, not {weight.dtype} on {weight.device}"
    return host.why_not()


class Packed:
    """A matrix B [k, n] as the C++ reads it."""

    def __init__(self, matrix: Tensor, scale: Tensor | None = None):
        self.k, self.n = matrix.shape
        library = host.library()
        library.smi_packed_floats.restype = ctypes.c_int64
        self.memory = torch.empty(library.smi_packed_floats(ctypes.c_int64(self.k), ctypes.c_int64(self.n)))
        strides = (ctypes.c_int64(stride) for stride in matrix.stride())
        sizes = (ctypes.c_int64(self.k), ctypes.c_int64(self.n))
        library.smi_pack(_at(matrix), *strides, _at(None if scale is None else scale.contiguous()), *sizes, _at(self.memory))

    def multiply(
        self, x: Tensor, out: Tensor | None, epilogue: str = "none", bias=None, residual=None, gamma=None, h=None, activation: str = "gelu"
    ) -> Tensor:
        """epilogue(x B): x [..., k], rows dense; out [..., n], contiguous, made where it is None."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.n)
        m = x.numel() // self.k
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, self.memory, bias, residual, gamma, h, out))
        params = Params(*pointers, m, self.k, self.n, self.k, EPILOGUES.index(epilogue), ACTIVATIONS.index(activation))
        host.library().smi_linear(ctypes.byref(params))
        return out


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class PackedLinear:
    """x W^T + b and what may follow it, forward and backward to x. weight: [m, k]; bias, gamma: [m]. Every x and gradient must be contiguous."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None):
        self.bias, self.gamma = (None if x is None else x.detach().contiguous() for x in (bias, gamma))
        self.right = Packed(weight.detach().T)
        self.left = Packed(weight.detach(), gamma)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        return self.right.multiply(x, out, bias=self.bias)

    def forward_residual(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """residual + gamma (x W^T + b)."""
        return self.right.multiply(x, out, "residual", self.bias, residual, self.gamma)

    def forward_activation(self, x: Tensor, activation: str, h: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """f(x W^T + b); its argument is kept in h [..., m] where one is given."""
        return self.right.multiply(x, out, "activation", self.bias, h=h, activation=activation)

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x from that of gamma (x W^T + b)."""
        return self.left.multiply(grad, out)

    def backward_activation(self, grad: Tensor, h: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """Gradient of h where x = f(h)."""
        return self.left.multiply(grad, out, "slope", h=h, activation=activation)
