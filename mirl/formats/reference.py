"""Official checkpoints computed from their own tensors, name by name, so that a conversion can be checked.

The official MIRL needs PaddlePaddle, which few have. This runs what its files hold without building any model of ours:
nothing is shared with `mirl.models`, and tokens stand in the official order, mask tokens put in their places.
Symbols: b images, n patches, d width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Reference:
    """A model made of the tensors of a file.

    Args:
        tensors: by official names.
        heads: of the encoder; transposed: whether matrices are stored as (in, out), as Paddle does.
    """

    def __init__(self, tensors: Mapping[str, Tensor], heads: int, *, transposed: bool) -> None:
        self.tensors, self.heads, self.transposed = tensors, heads, transposed

    def classify(self, images: Tensor) -> Tensor:
        """Return the scores [b, classes] of a fine-tuned classifier, or the features [b, d] of an encoder."""
        x = self._blocks(self._with_class_token(self._embed(images)), "blocks", self.heads)
        if "fc_norm.weight" in self.tensors:
            x = self._norm(x[:, 1:].mean(dim=1), "fc_norm")
        else:
            x = self._norm(x, "norm")
            x = x[:, 0] if "head.weight" in self.tensors else x[:, 1:].mean(dim=1)
        return self._linear(x, "head") if "head.weight" in self.tensors else x

    def mae(self, images: Tensor, visible: Tensor, heads: int) -> list[Tensor]:
        """Return MAE's predictions [b, n, p] of all patches, from the `visible` ones [b, v]; `heads`: the decoder's."""
        z = self._norm(self._blocks(self._visible(images, visible), "blocks", self.heads), "norm")
        x = self._unshuffle(self._linear(z, "decoder_embed"), "mask_token", visible) + self.tensors["decoder_pos_embed"]
        x = self._norm(self._blocks(x, "decoder_blocks", heads), "decoder_norm")
        return [self._linear(x, "decoder_pred")[:, 1:]]

    def mirl(self, images: Tensor, visible: Tensor, heads: int, taps: Sequence[int]) -> list[Tensor]:
        """Return the predictions [b, n, p] of every decoder, shallow to deep, from the `visible` patches [b, v].

        Args:
            heads: of the decoders; taps: after how many blocks each of them reads.
        """
        z = self._visible(images, visible)
        memory = [self._linear(self._norm(z, "norm_low"), "decoder_embed0_1")]
        predictions, start = [], 0
        for g, stop in enumerate(taps):
            z = self._blocks(z, "blocks", self.heads, range(start, stop))
            start = stop
            tokens = self._linear(self._norm(z, "norm" if g == len(taps) - 1 else f"norm{g}"), f"decoder_embed{g}")
            x = self._unshuffle(tokens, f"mask_token{g}", visible) + self.tensors[f"decoder_pos_embed{g}"]
            x = self._blocks(x, f"decoder_blocks{g}", heads, memory=torch.cat(memory[::-1], dim=1))
            memory.append(tokens)
            x = self._norm(x, f"decoder_norm{g}")
            predictions.append(self._predict(x, f"decoder_pred{g}")[:, 1:])
        return predictions

    def _embed(self, images: Tensor) -> Tensor:
        """Return the embedded patches [b, n, d] with their positions."""
        kernel = self.tensors["patch_embed.proj.weight"]
        x = F.conv2d(images, kernel, self.tensors["patch_embed.proj.bias"], stride=kernel.shape[-1])
        return x.flatten(2).mT + self.tensors["pos_embed"][:, 1:]

    def _with_class_token(self, x: Tensor) -> Tensor:
        token = self.tensors["cls_token"] + self.tensors["pos_embed"][:, :1]
        return torch.cat([token.expand(len(x), -1, -1), x], dim=1)

    def _visible(self, images: Tensor, visible: Tensor) -> Tensor:
        x = self._embed(images)
        return self._with_class_token(torch.stack([image[kept] for image, kept in zip(x, visible, strict=True)]))

    def _unshuffle(self, tokens: Tensor, mask_token: str, visible: Tensor) -> Tensor:
        """Put visible tokens in their places [b, 1 + n, d], the mask token in all others, the class token first."""
        patches = self.tensors["pos_embed"].shape[1] - 1
        x = self.tensors[mask_token].repeat(len(tokens), 1 + patches, 1)
        for image, own, kept in zip(x, tokens, visible, strict=True):
            image[0] = own[0]
            image[1 + kept] = own[1:]
        return x

    def _blocks(
        self, x: Tensor, prefix: str, heads: int, numbers: Sequence[int] | None = None, memory: Tensor | None = None
    ) -> Tensor:
        number = 0 if numbers is None else numbers[0]
        while f"{prefix}.{number}.norm1.weight" in self.tensors and (numbers is None or number in numbers):
            block = f"{prefix}.{number}"
            q, k, v = self._linear(self._norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
            x = x + self._linear(_attend(q, k, v, heads), f"{block}.attn.proj")
            if memory is not None:
                q = self._linear(self._norm(x, f"{block}.norm2"), f"{block}.cross_attn.q")
                k, v = self._linear(self._norm(memory, f"{block}.norm3"), f"{block}.cross_attn.kv").chunk(2, dim=-1)
                x = x + self._linear(_attend(q, k, v, heads), f"{block}.cross_attn.proj")
            hidden = self._linear(self._norm(x, f"{block}.norm{2 if memory is None else 4}"), f"{block}.mlp.fc1")
            x = x + self._linear(F.gelu(hidden), f"{block}.mlp.fc2")
            number += 1
        return x

    def _predict(self, x: Tensor, name: str) -> Tensor:
        """Predict pixels; with weight normalisation each input feature's weights have length weight_g."""
        if f"{name}.weight_v" not in self.tensors:
            return self._linear(x, name)
        direction = self.tensors[f"{name}.weight_v"]  # (in, out)
        weight = direction / direction.norm(dim=1, keepdim=True) * self.tensors[f"{name}.weight_g"].view(-1, 1)
        return x @ weight + self.tensors[f"{name}.bias"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.linear(x, weight.T if self.transposed else weight, self.tensors[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)
