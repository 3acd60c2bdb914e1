"""Adapter modules inside the towers: prompt tokens, bottlenecks, image-conditional prompts.

They are built from the config and run as forward hooks of each tower's list of blocks, so a saved
folder brings them back wherever it is loaded. Hooks are bound methods of modules: a copy of the
model has hooks of its own, and weights move with the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .heads import HEADS, Head

PARTS = ("vision", "text", "bottleneck")
# Where a bottleneck stands, and the standard deviation of its weights at first.
PLACEMENTS = {"mlp": 0.02, "block": 1e-3}
TEXT_CHUNK = 128  # texts that go through the tower together


class LayerTokens(nn.Module):
    """Deep prompt tokens: one set of learned tokens for each of a tower's first blocks.

    Args:
        depth: Number of blocks.
        tokens: Tokens M of each.
        width: Of the tower.
    """

    def __init__(self, depth: int, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(depth, tokens, width))
        self.reset()

    def reset(self) -> None:
        """Normal initialisation, standard deviation 0.02."""
        init.normal_(self.table, std=0.02)

    def forward(self, layer: int) -> Tensor:
        """The tokens `[M, width]` of one block."""
        return self.table[layer]


class Bottleneck(nn.Module):
    """Bottleneck adapter: `x + up(relu(down(x)))` (Glo-VLMs, arXiv 2511.11984).

    Args:
        width: Of the tower.
        hidden: Of the bottleneck.
        std: Standard deviation of the weights at first.
    """

    def __init__(self, width: int, hidden: int, std: float = PLACEMENTS["block"]) -> None:
        super().__init__()
        self.std = std
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.reset()

    def reset(self) -> None:
        """Small normal weights: almost the identity at first."""
        for linear in (self.down, self.up):
            init.normal_(linear.weight, std=self.std)
            init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[n, length, width]` to the same shape."""
        changed: Tensor = tokens + self.up(nn.functional.relu(self.down(tokens)))
        return changed

    def adapt_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a block, or of the last module before its residual sum."""
        return _with_hidden(output, self(_hidden(output)))


class AdapterModules(nn.Module):
    """Prompt tokens and bottleneck adapters between and in the blocks of one model's towers.

    Tokens of the vision tower stand right behind the class token (in front where there is none):
    inserted before block 0, replaced before each of the next `depth - 1` blocks, removed behind the
    last. With `normed` the first of them pass the norm that CLIP's tower has before block 0, as if
    they stood before it. So pooling sees the tower's own tokens, while `attentions` and all but the
    last of the `hidden_states` show the inserted ones too; patches stand last everywhere.

    Tokens of the text tower replace, before each of the blocks 1 ... `depth - 1`, the hidden states
    at those rows of the vocabulary that hold the learned context; a text without them is read as
    the plain tower reads it.

    Args:
        spec: `{"vision": {"tokens", "depth", "normed"}}`: VPT (arXiv 2203.12119); with `{"text":
            {"token_ids", "depth"}}`: MaPLe (arXiv 2210.03117); `{"bottleneck": {"layers", "width",
            "placement"}}`: Glo-VLMs' adapter (arXiv 2511.11984), on what a block's MLP adds (`mlp`)
            or behind the block (`block`). Layers count from 0. Models saved before `normed` and
            `placement` existed lack them: not normed, behind the block.
        backbone: A dual encoder with `vision_model` and `text_model`; gets the hooks.

    Raises:
        ValueError: A part is unknown, or a tower has no such blocks.
    """

    def __init__(self, spec: dict[str, Any], backbone: Any) -> None:
        super().__init__()
        if unknown := set(spec) - set(PARTS):
            raise ValueError(
                f"Adapter modules are {', '.join(PARTS)}; found {', '.join(sorted(unknown))}: this "
                "folder needs a newer version, or its config is wrong."
            )
        self.vision: nn.Module | None = None
        self.text: nn.Module | None = None
        self.bottlenecks = nn.ModuleDict()
        if vision := spec.get("vision"):
            self._add_vision_tokens(
                backbone.vision_model,
                vision["tokens"],
                vision["depth"],
                vision.get("normed", False),
            )
        if text := spec.get("text"):
            self._add_text_tokens(backbone.text_model, text["token_ids"], text["depth"])
        if bottleneck := spec.get("bottleneck"):
            placement = bottleneck.get("placement", "block")
            self._add_bottlenecks(
                backbone.vision_model, bottleneck["layers"], bottleneck["width"], placement
            )

    def _add_vision_tokens(self, tower: Any, tokens: int, depth: int, normed: bool) -> None:
        blocks = tower_blocks(tower, depth)
        self.vision = LayerTokens(depth, tokens, tower.config.hidden_size)
        self.tokens, self.depth = tokens, depth
        self.begin = int(_has_class_token(tower))
        for layer, block in enumerate(blocks):
            norm = _first_norm(tower) if normed and layer == 0 else None
            block.register_forward_pre_hook(
                partial(self._before_vision_block, layer, norm), with_kwargs=True
            )
        # First among the hooks: the one by which transformers records hidden states comes later.
        blocks[-1].register_forward_hook(self._after_vision, prepend=True)

    def _add_text_tokens(self, tower: Any, token_ids: list[int], depth: int) -> None:
        blocks = tower_blocks(tower, depth)
        self.text = LayerTokens(depth - 1, len(token_ids), tower.config.hidden_size)
        self.token_ids = list(token_ids)
        tower.register_forward_pre_hook(self._before_text, with_kwargs=True)
        tower.register_forward_hook(self._after_text, always_call=True)
        for layer, block in enumerate(blocks[1:depth]):
            block.register_forward_pre_hook(
                partial(self._before_text_block, layer), with_kwargs=True
            )

    def _add_bottlenecks(self, tower: Any, layers: list[int], width: int, placement: str) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(
                f"A bottleneck's placement is {' or '.join(PLACEMENTS)}; found '{placement}': this "
                "folder needs a newer version, or its config is wrong."
            )
        blocks = tower_blocks(tower, max(layers, default=0) + 1)
        for layer in layers:
            bottleneck = Bottleneck(tower.config.hidden_size, width, PLACEMENTS[placement])
            self.bottlenecks[str(layer)] = bottleneck
            place = blocks[layer] if placement == "block" else _before_sum(blocks[layer])
            place.register_forward_hook(bottleneck.adapt_output, prepend=True)

    def _before_vision_block(
        self,
        layer: int,
        norm: nn.Module | None,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer < self.depth:
            assert self.vision is not None  # the hook would not be there
            tokens = self.vision(layer).to(hidden.dtype)
            tokens = (tokens if norm is None else norm(tokens)).expand(len(hidden), -1, -1)
            rest = hidden[:, self.begin + (self.tokens if layer > 0 else 0) :]
            hidden = torch.cat([hidden[:, : self.begin], tokens, rest], dim=1)
        args, kwargs = _with_first(args, kwargs, hidden)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:  # the tower makes it for its own tokens, and hands it to every block
            mask = widen_mask(mask, self.begin, self.tokens)
            if len(args) > 1:
                args = (args[0], mask, *args[2:])
            else:
                kwargs = {**kwargs, "attention_mask": mask}
        return args, kwargs

    def _after_vision(self, block: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        own = [hidden[:, : self.begin], hidden[:, self.begin + self.tokens :]]
        return _with_hidden(output, torch.cat(own, dim=1))

    def _before_text(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        _WHERE.set(None if ids is None else ids.unsqueeze(-1) == ids.new_tensor(self.token_ids))

    def _after_text(self, tower: nn.Module, args: Any, output: Any) -> None:
        _WHERE.set(None)

    def _before_text_block(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        where = _WHERE.get()
        if where is None:
            return None
        assert self.text is not None  # the hook would not be there
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = self.text(layer).to(hidden.dtype)[where.int().argmax(-1)]
        hidden = torch.where(where.any(-1, keepdim=True), tokens, hidden)
        return _with_first(args, kwargs, hidden)


# Where the texts of the running forward pass hold the learned context `[n, length, M]`. Of its own
# in every thread, as two may read texts at a time.
_WHERE: ContextVar[Tensor | None] = ContextVar("where_the_context_stands", default=None)


def tower_blocks(tower: Any, depth: int = 0) -> list[nn.Module]:
    """Blocks of a transformer tower: its longest module list.

    Args:
        tower: A vision or text tower.
        depth: How many blocks are needed at least.

    Raises:
        ValueError: It is no plain stack of as many blocks as its config states (a convolutional
            network, a hierarchical or weight-sharing transformer), or it has too few.
    """
    lists = [list(m) for m in tower.modules() if isinstance(m, nn.ModuleList)]
    blocks = max(lists, key=len, default=[])
    expected = getattr(tower.config, "num_hidden_layers", None)
    if not blocks or len(blocks) != expected or not hasattr(tower.config, "hidden_size"):
        raise ValueError(
            f"Tokens and bottlenecks go between the blocks of a plain transformer: expected a list "
            f"of {expected or 'some'} blocks in {type(tower).__name__}, found {len(blocks)}. Use "
            "another tower, or a method on features (linear_probe)."
        )
    if depth > len(blocks):
        raise ValueError(
            f"{type(tower).__name__} has {len(blocks)} blocks, and {depth} were requested: "
            "lower the depth."
        )
    return blocks


def widen_mask(mask: Any, begin: int, count: int) -> Tensor:
    """Attention mask for inserted tokens: all attend to them, and they attend as the others do.

    Args:
        mask: `[n, heads, queries, keys]`, boolean (true: attended to) or added to the scores;
            or `[n, keys]`, 1: attended to. It masks padding alone, so all its rows are the same.
        begin: Where the tokens stand.
        count: How many.

    Raises:
        ValueError: The attention back end has another kind of mask.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            "Inserted tokens need the attention mask as a tensor, found "
            f"{type(mask).__name__}: load the model with attn_implementation='sdpa'."
        )
    seen = 0 if mask.dim() == 4 and mask.is_floating_point() else 1
    keys = mask.new_full((*mask.shape[:-1], count), seen)
    wide = torch.cat([mask[..., :begin], keys, mask[..., begin:]], dim=-1)
    if mask.dim() == 2 or mask.shape[-2] == 1:
        return wide
    queries = wide[..., :1, :].expand(*wide.shape[:-2], count, -1)
    return torch.cat([wide[..., :begin, :], queries, wide[..., begin:, :]], dim=-2)


class ConditionalPromptHead(Head):
    """CoCoOp: class texts whose context is shifted by the image feature (arXiv 2203.05557).

    `logits_k = scale * cos(f, g([v_1 + h(f)] ... [v_M + h(f)] [class k]))`, with `g` the text tower
    and `h` two linear layers, ReLU between them. Every image reads every class text anew.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes K; each has one text.
        width: Of the text tower's token embedding.
        length: Of the texts, in tokens.
        context: Number of context tokens M.
        begin: Where they stand in each text: behind the start token, if there is one.
        hidden: Width between the two layers (`dim / 16` as published).
    """

    kind = "conditional_prompts"
    needs_model = True

    def __init__(
        self,
        dim: int,
        num_classes: int,
        width: int,
        length: int,
        context: int = 4,
        begin: int = 1,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        self.begin = begin
        self.context = nn.Parameter(torch.zeros(context, width))
        self.shift = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.scale = nn.Parameter(torch.ones(()))
        self.input_ids: Tensor
        self.attention_mask: Tensor
        self.register_buffer("input_ids", torch.zeros(num_classes, length, dtype=torch.long))
        self.register_buffer("attention_mask", torch.ones(num_classes, length, dtype=torch.long))

    def describe(self) -> dict[str, Any]:
        """The sizes, and the position of the context."""
        return {
            "width": self.context.shape[1],
            "length": self.input_ids.shape[1],
            "context": len(self.context),
            "begin": self.begin,
            "hidden": self.shift[0].out_features,
        }

    def reset(self) -> None:
        """Normal context tokens of standard deviation 0.02, and empty class texts."""
        init.normal_(self.context, std=0.02)
        init.ones_(self.scale)
        init.zeros_(self.input_ids)
        init.ones_(self.attention_mask)

    def forward(self, features: Tensor, model: Any) -> Tensor:
        """Map features `[n, dim]` to logits `[n, K]`.

        Args:
            features: Image features, not normalised.
            model: The `GloVLMModel` whose text tower reads the classes.
        """
        unit = nn.functional.normalize(features, dim=-1)
        cosines = [(unit[image] * text).sum(-1) for image, text in self._texts(unit, model)]
        logits: Tensor = self.scale * torch.cat(cosines) if cosines else unit.new_zeros(0)
        return logits.view(len(unit), len(self.input_ids))

    def prototypes(self, features: Tensor, model: Any) -> Tensor:
        """Class prototypes of each image `[n, K, dim]`, from unit image features `[n, dim]`."""
        texts = torch.cat([text for _, text in self._texts(features, model)])
        return texts.view(len(features), len(self.input_ids), -1)

    def _texts(self, unit: Tensor, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Class texts of each image in chunks: image indices, unit text features."""
        context = self.context + self.shift(unit).unsqueeze(1)
        classes = len(self.input_ids)
        pairs = torch.arange(len(unit) * classes, device=unit.device)
        for pair in pairs.split(TEXT_CHUNK) if len(pairs) else ():
            image, label = pair // classes, pair % classes
            read = (model, context[image], self.input_ids[label], self.attention_mask[label])
            if torch.is_grad_enabled() and len(pairs) > TEXT_CHUNK:
                # Memory holds one chunk's activations, however many classes there are.
                yield image, checkpoint(self._read, *read, use_reentrant=False)
            else:
                yield image, self._read(*read)

    def _read(self, model: Any, context: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Unit features of texts with their context `[n, M, width]` put in."""
        with _spliced(model.get_input_embeddings(), context, self.begin):
            features = model.get_text_features(input_ids, mask).pooler_output
        return nn.functional.normalize(features, dim=-1)


HEADS[ConditionalPromptHead.kind] = ConditionalPromptHead


@contextmanager
def _spliced(embedding: nn.Module, context: Tensor, begin: int) -> Iterator[None]:
    """Replace M tokens of each of the next `n` texts by vectors `[n, M, width]`."""
    thread = get_ident()

    def splice(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if get_ident() != thread:  # another thread reads texts of its own
            return None
        end = begin + context.shape[1]
        parts = [output[:, :begin], context.to(output.dtype), output[:, end:]]
        return torch.cat(parts, dim=1)

    handle = embedding.register_forward_hook(splice)
    try:
        yield
    finally:
        handle.remove()


def _first_norm(tower: nn.Module) -> nn.Module | None:
    """Norm of each token between a tower's embeddings and its blocks: CLIP's, or none."""
    return next((m for name, m in tower.named_modules() if name.endswith("pre_layrnorm")), None)


def _before_sum(block: nn.Module) -> nn.Module:
    """Module whose output the last residual sum of a block adds: its MLP, or DINOv2's scale."""
    for name in ("layer_scale2", "mlp"):
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    raise ValueError(
        f"{type(block).__name__} has no 'mlp' to put a bottleneck on: use placement 'block', which "
        "puts it behind the block."
    )


def _has_class_token(tower: nn.Module) -> bool:
    names = [name.rpartition(".")[2] for name, _ in tower.named_parameters()]
    return any(name in ("class_embedding", "cls_token", "class_token") for name in names)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
