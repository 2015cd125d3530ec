"""Compile the Triton kernels for NVIDIA GPUs that need not be there.

The functions are called on tensors of the CPU, and nothing is launched. For each kernel a line says
compute capability, name, and the bytes of shared memory that it asks for.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget

from multimax.kernels import triton_arguments, triton_attention, triton_output

# Capability, head dimension, dropout, shape of a bias, whether it is added before the modulation,
# scalars; whether there are a factor and a cap, and whether the factor is first.
CASES = [
    (80, 80, 0.0, (1, 4, 100, 90), False, 10, False, False),
    (90, 20, 0.1, (2, 1, 1, 90), True, 10, True, True),
    (80, 64, 0.0, None, False, 10, False, False),
    (120, 64, 0.0, None, False, 2, True, False),
]


class Driver:
    """What the compiler asks of a driver; each case is a device of its own."""

    case = 0

    def get_current_device(self):
        return self.case

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", CASES[self.case][0], 32)


def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    print(CASES[driver.case][0], self.fn.__name__, kernel.metadata.shared)


def call_kernels(dim, dropout, shape, before, scalars, steps, first):
    query = torch.zeros(2, 4, 100, dim, dtype=torch.bfloat16, requires_grad=True)
    key, value = torch.zeros(2, 2, 2, 90, dim, dtype=torch.bfloat16, requires_grad=True)
    c = torch.zeros(scalars, requires_grad=True)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    bias = None if shape is None else torch.zeros(shape, requires_grad=True)
    options = (mask, True, dropout, None, bias, before)
    if steps:
        factor = torch.ones(1, 4, 100, 1, requires_grad=True)
        options += (factor, first, 30.0, True)
    output = triton_attention.triton_attention(query, key, value, c, *options)
    sum(tensor.sum() for tensor in (output if steps else [output])).backward()
    scores, weight = torch.zeros(4, 5000, dtype=torch.bfloat16), torch.ones(4)
    target = torch.zeros(4, dtype=torch.int64)
    triton_output.modulated_cross_entropy_(scores, target, c.detach(), weight, 0.1)


driver = Driver()
triton.runtime.driver.set_active(driver)
launch, triton.JITFunction.run = triton.JITFunction.run, compile_only
triton_arguments.check_device = triton_output.check_device = lambda *_: None
for driver.case, (_, *arguments) in enumerate(CASES):
    call_kernels(*arguments)
