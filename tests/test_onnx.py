"""Every normalizer, attention and model as ONNX: equal outputs in onnxruntime, for all sizes."""

import pytest
import torch
from subjects import NORMALIZERS, SIZES, subject

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def session(item):
    inputs = item.draw(*SIZES[0])
    program = torch.onnx.export(
        item.module, inputs, dynamo=True, dynamic_shapes=item.dynamic, verbose=False
    )
    model = program.model_proto
    assert {function.domain for function in model.opset_import} == {""}  # ONNX's own operators
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    serialized = model.SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


SUBJECTS = [*NORMALIZERS, "attention", "vision_transformer-class-token", "transformer_lm-adaptive"]


# Models with more layers hold nothing else, and take long.
@pytest.mark.parametrize("name", [*SUBJECTS, "step"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_equal_in_onnxruntime(name):
    item = subject(name)
    running = session(item)
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
