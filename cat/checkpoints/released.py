"""Released checkpoints and state dicts into ours, and back.

The authors' code names parameters after fairseq's data2vec 2.0 (``modality_encoders.IMAGE.patch_embed.0.proj.weight``);
the EMA teacher has the same names without decoder and projection. `cat-audio convert` does whole files: its output is a
checkpoint for every command that takes one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cat.checkpoints.foreign import read_foreign
from cat.checkpoints.store import unwrapped
from cat.model import CAT, ModelConfig, ObjectiveConfig

IMAGE = "modality_encoders.IMAGE."

# (released pattern, ours), both with {placeholders} for the numbers; "encoder" parts exist in the teacher as well.
ENCODER_NAMES = [
    (IMAGE + "extra_tokens", "cls"),
    (IMAGE + "local_encoder.proj.{p}", "stem.proj.{p}"),
    (IMAGE + "patch_embed.{i}.proj.{p}", "stem.embeds.{i}.proj.{p}"),
    (IMAGE + "patch_embed.{i}.norm.{p}", "stem.embeds.{i}.norm.{p}"),
    (IMAGE + "patch_embed.{i}.{p}", "stem.proj.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.norm1.{p}", "stem.stages.{i}.{j}.norm1.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.norm2.{p}", "stem.stages.{i}.{j}.norm2.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.conv1.{p}", "stem.stages.{i}.{j}.conv1.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.conv2.{p}", "stem.stages.{i}.{j}.conv2.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.attn.{p}", "stem.stages.{i}.{j}.dwconv.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.mlp.fc1.{p}", "stem.stages.{i}.{j}.fc1.{p}"),
    (IMAGE + "conv_blocks.{i}.{j}.mlp.fc2.{p}", "stem.stages.{i}.{j}.fc2.{p}"),
    (IMAGE + "stage_output_decode.{i}.{p}", "stem.sides.{i}.{p}"),
    (IMAGE + "context_encoder.norm.{p}", "norm.{p}"),
    ("blocks.{i}.norm1.{p}", "blocks.{i}.norm1.{p}"),
    ("blocks.{i}.norm2.{p}", "blocks.{i}.norm2.{p}"),
    ("blocks.{i}.attn.qkv.{p}", "blocks.{i}.qkv.{p}"),
    ("blocks.{i}.attn.proj.{p}", "blocks.{i}.proj.{p}"),
    ("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.fc1.{p}"),
    ("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.fc2.{p}"),
]
OTHER_NAMES = [
    (IMAGE + "decoder.blocks.{i}.0.{p}", "decoder.convs.{i}.{p}"),
    (IMAGE + "decoder.proj.{p}", "decoder.proj.{p}"),
    ("clap_proj.{p}", "regulariser.{p}"),
]
# Buffers and tables of the released model that ours computes, and heads that only fine-tuning has.
IGNORED = re.compile(r".*(fixed_positional_encoder|_ema|alibi|relative_positional)")


def _pattern(template: str) -> re.Pattern[str]:
    fields = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>weight|bias)"}
    return re.compile(re.escape(template).replace(r"\{", "{").replace(r"\}", "}").format(**fields))


_STUDENT_RULES = [(_pattern(theirs), "student." + ours) for theirs, ours in ENCODER_NAMES] + [
    (_pattern(theirs), ours) for theirs, ours in OTHER_NAMES
]


def our_name(released: str) -> str | None:
    """Our name of a released student parameter, or None where there is none."""
    for pattern, ours in _STUDENT_RULES:
        if match := pattern.fullmatch(released):
            return ours.format(**match.groupdict())
    return None


def infer_config(state: Mapping[str, Tensor], *, num_heads: int | None = None, mel_bins: int = 128) -> ModelConfig:
    """Architecture of a released student state dict, read from its shapes.

    ``num_heads`` leaves no trace in the weights; by default heads are 64 wide, as in every released model.
    """
    channels: list[int] = []
    resolutions: list[int] = []
    plain = state.get(IMAGE + "local_encoder.proj.weight")
    if plain is not None:
        stem, dim = "patch", plain.shape[0]
        resolutions.append(plain.shape[-1])
    else:
        stem = "multires"
        while (weight := state.get(f"{IMAGE}patch_embed.{len(resolutions)}.proj.weight")) is not None:
            resolutions.append(weight.shape[-1] * (resolutions[-1] if resolutions else 1))
            channels.append(weight.shape[0])
        if not resolutions:
            raise ValueError(
                f"no stem among the {len(state)} parameters; expected '{IMAGE}patch_embed.0.proj.weight' or "
                f"'{IMAGE}local_encoder.proj.weight': is this a CAT pre-training checkpoint? "
                f"It starts with {sorted(state)[:3]}"
            )
        dim = channels.pop()
    depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    convs = [w for i in range(64) if (w := state.get(f"{IMAGE}decoder.blocks.{i}.0.weight")) is not None]
    if (mlp := state.get("blocks.0.mlp.fc1.weight")) is None:
        raise ValueError("no blocks.0.mlp.fc1.weight: expected a pre-training checkpoint with transformer blocks")
    decoder_dim = convs[0].shape[0] if convs else dim
    return ModelConfig(
        stem=stem,
        resolutions=tuple(resolutions),
        channels=tuple(channels),
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads or max(1, dim // 64),
        mlp_ratio=mlp.shape[0] / dim,
        mel_bins=mel_bins,
        decoder_dim=decoder_dim,
        decoder_layers=len(convs),
        decoder_groups=dim // convs[0].shape[1] if convs else 1,
        decoder_kernel=convs[0].shape[-1] if convs else 3,
    )


def from_released(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None = None,
    *,
    num_heads: int | None = None,
    objective: ObjectiveConfig | None = None,
) -> CAT:
    """Our model with released weights.

    Args:
        student: released names -> tensors.
        teacher: the EMA teacher's, same names; None: the teacher starts as the student.
        num_heads: see `infer_config`.
        objective: losses to train on further; ``regularisation_projection`` must be the released run's, "student" but
            for its odd ``proj_type``.

    Raises:
        ValueError: parameters that are missing, unknown or of another shape, named.
    """
    config, objective = infer_config(student, num_heads=num_heads), objective or ObjectiveConfig()
    embedding_dim = None
    if (projection := student.get("clap_proj.weight")) is not None:
        embedding_dim = projection.shape[objective.regularisation_projection == "external"]
    model = CAT(config, objective, embedding_dim=embedding_dim)
    state = _translate(student)
    teacher_state = _translate(student if teacher is None else teacher)
    state |= {
        "teacher" + name.removeprefix("student"): t for name, t in teacher_state.items() if name.startswith("student.")
    }

    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"released weights do not fit this architecture: missing {missing[:5]}, not expected {unknown[:5]}"
        )
    for name, tensor in state.items():
        if tensor.numel() != own[name].numel():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint; expected {tuple(own[name].shape)}"
            )
    model.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in state.items()})
    return model


def to_released(model: CAT) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(student, teacher) state dicts under the released names and shapes."""
    config = model.config
    last_embed = len(config.resolutions)  # the final Linear is the last entry of the released ``patch_embed`` list
    names = {ours.removeprefix("student."): theirs for theirs, ours in _all_names(config, last_embed)}
    student, teacher = {}, {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "teacher":
            teacher[names[rest]] = _released_shape(names[rest], tensor)
        else:
            released = names[rest] if part == "student" else names[name]
            student[released] = _released_shape(released, tensor)
    return student, teacher


def _all_names(config: ModelConfig, last_embed: int) -> list[tuple[str, str]]:
    """Every (released, ours) pair that this architecture can have."""
    pairs = []
    for theirs, ours in ENCODER_NAMES + OTHER_NAMES:
        if "local_encoder" in theirs and config.stem != "patch":
            continue
        if ours == "stem.proj.{p}" and config.stem == "patch" and "local_encoder" not in theirs:
            continue
        last_only = theirs.endswith("patch_embed.{i}.{p}")
        for i in [last_embed] if last_only else range(64 if "{i}" in theirs else 1):
            for j in range(8 if "{j}" in theirs else 1):
                for p in ("weight", "bias") if "{p}" in theirs else ("",):
                    pairs.append((theirs.format(i=i, j=j, p=p), ours.format(i=i, j=j, p=p)))
    return pairs


def _released_shape(name: str, tensor: Tensor) -> Tensor:
    if re.search(r"conv_blocks\.\d+\.\d+\.(conv[12]|mlp\.fc[12])\.weight$", name):
        return tensor[:, :, None, None]
    return tensor


def _translate(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state, unknown = {}, []
    for name, tensor in released.items():
        if (ours := our_name(name)) is not None:
            state[ours] = tensor
        elif not IGNORED.match(name):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters have no place in CAT, among them {unknown[:3]}: expected the names of a "
            "released pre-training checkpoint"
        )
    return state


# ----------------------------------------------------------------------------------------------------------- files


def read_released(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(student, teacher or None) of a released ``.pt`` file, or of a ``.safetensors`` with the same names.

    Nothing in the file is executed (`read_foreign`).
    """
    path = Path(path)
    content = read_foreign(path)
    if path.suffix == ".safetensors":
        return _split_teacher(content)
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a dictionary with the weights under 'model'"
        )
    return _split_teacher(model)


def _split_teacher(model: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The teacher is a dictionary under ``_ema``, or parameters whose names start with ``_ema.``."""
    tensors, nested = _tensors(model), model.get("_ema")
    student = {k: v for k, v in tensors.items() if not k.startswith("_ema")}
    flat = {k.removeprefix("_ema."): v for k, v in tensors.items() if k.startswith("_ema.")}
    teacher = _tensors(nested) if isinstance(nested, Mapping) else flat
    return student, teacher or None


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    return unwrapped(
        {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}, "the checkpoint"
    )
