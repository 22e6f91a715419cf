"""ONNX files of a `PRU` and of its language model, through the LSTM that they fold into.

Batch and steps stay free, and any runtime serves the file: a layer is one LSTM node. Its matrices are dense, so the
file holds, and the runtime multiplies, g times the context weights of the grouped form.
"""

from __future__ import annotations

import copy
from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.module import PRU


def export_onnx(model: PRU | PRUForCausalLM, path: str | Path, *, has_state: bool = True) -> None:
    """Write an ONNX file that computes in fp32 what the model does in eval mode.

    A `PRU`: `input`, `h_0`, `c_0` → `output`, `h_n`, `c_n`, shaped as the module takes and returns them (batched).

    A language model: `input_ids`, int64 (batch, steps), and `past.i.h`, `past.i.c`, fp32 (1, batch, size of layer i) →
    `logits`, fp32 (batch, steps, vocab_size), and `present.i.h`, `present.i.c`, which are the next call's past.

    Args:
        model: Weights of another dtype are converted to fp32.
        path: A file that is there is replaced.
        has_state: Take the state as inputs; without them every call begins at zeros. It is given out in any case.

    Raises:
        ConfigError: The package onnx is missing, sub-sampling is `max`, the weights are too large for one file, or it
            can't be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(f"ONNX export needs the package onnx: pip install 'flashlm[onnx]' ({error})") from error
    from flashlm.pru.onnx_graph import language_model_graph, module_graph

    plain = copy.deepcopy(model).float().cpu()
    made = module_graph(plain, has_state) if isinstance(plain, PRU) else language_model_graph(plain, has_state)
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    try:
        onnx.save_model(made, draft, format="protobuf")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"the model can't be written to {path}: {error.strerror}") from error
