"""Every normalizer, attention and model as ONNX: equal outputs in onnxruntime, for all sizes."""

from functools import cache

import pytest
import torch
from subjects import NORMALIZERS, SIZES, subject
from test_export import exported
from torch.onnx._internal.exporter._registration import ONNXRegistry

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def _one_table_of_operators():
    """The same is otherwise made for each export, which takes longer than the export itself."""
    with pytest.MonkeyPatch.context() as patch:
        known = staticmethod(cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", known)
        yield


def session(program):
    model = program.model_proto
    assert {function.domain for function in model.opset_import} == {""}  # ONNX's own operators
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    serialized = model.SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def assert_equal_in_onnxruntime(program, item):
    running = session(program)
    names = [argument.name for argument in running.get_inputs()]
    for sizes in SIZES:
        inputs = item.draw(*sizes)
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        got = [torch.from_numpy(array) for array in running.run(None, feed)]
        with torch.no_grad():
            expected = item.module(*inputs)
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        # Logarithms of models are sums of terms around 10, whose last bit is 1e-6.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


SUBJECTS = [*NORMALIZERS, "attention", "vision_transformer-class-token", "transformer_lm-adaptive"]
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


# Models with more layers hold nothing else, and take long.
@pytest.mark.slow
@quietly
@pytest.mark.parametrize("name", [*SUBJECTS, "step"])
def test_equal_in_onnxruntime(name):
    program = torch.onnx.export(exported(name), dynamo=True, verbose=False)
    assert_equal_in_onnxruntime(program, subject(name))


@pytest.mark.slow
@quietly
def test_a_module_becomes_onnx_at_once():
    item = subject("multimax-affine")
    inputs, options = item.draw(*SIZES[0]), dict(dynamic_shapes=item.dynamic, verbose=False)
    program = torch.onnx.export(item.module.eval(), inputs, dynamo=True, **options)
    assert_equal_in_onnxruntime(program, item)
