"""What the compiled programs of a run may send between devices, what they must, and what an update may keep twice.

Oracles: the parameters' own shapes and the mesh's sizes. A program's arrays are told apart by their shapes and by the
operation of the source that they come from.
"""

import dataclasses
import math
import re

import jax
from flax.traverse_util import flatten_dict

from qwenla_jax.parallel.sharding import gathered
from qwenla_jax.planner.hlo import KINDS, group_size, parse

# Numbers of an array that may always be gathered: ends of runs, best tokens, maxima, counts.
FEW = 256


@dataclasses.dataclass(frozen=True)
class Sent:
    """One array of a collective: its kind, type, shape, how many devices meet, and the source's operation."""

    kind: str
    dtype: str
    shape: tuple
    group: int
    where: str


def sent(text):
    """All arrays that the program's collectives make."""
    result = []
    for instructions in parse(text)[1].values():
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                where = re.search(r'op_name="([^"]*)"', one.rest)
                for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", one.type)):
                    shape = tuple(int(n) for n in dims.split(",") if n)
                    result.append(Sent(kind, dtype, shape, group_size(one.rest, 8), where[1] if where else ""))
    return result


# Newer releases of jax name the gather of a layer's parameter by the slice of the stack that gives it.
SLICE = "while/body/jit(dynamic_index_in_dim)/squeeze"
WHOLE = "pos_embed/sharding_constraint"


class Parts:
    """Shapes that arrays of a parameter have on a device.

    Attributes:
      layer: once it is whole over fsdp, of a stack one layer's: what a product needs.
      kept: as it lies.
      whole: of those that every device holds whole, the shape: their gradients have to become whole too.
    """

    def __init__(self, runtime, params):
        self.layer, self.selected, self.whole = set(), set(), set()
        together = jax.tree.leaves(gathered(runtime.shardings))
        for (path, leaf), layout, full in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(runtime.shardings), together, strict=True
        ):
            stacked = any(key.key in ("layers", "blocks") for key in path)
            cut = lambda shape, stacked=stacked: shape[1:] if stacked else shape  # noqa: E731
            self.layer.add(cut(full.shard_shape(leaf.shape)))
            self.selected.add(cut(layout.shard_shape(leaf.shape)))
            if layout.shard_shape(leaf.shape) == leaf.shape:
                self.whole.add(leaf.shape)


def check_gathers(result, runtime, params):
    """No logits of the whole vocabulary, no keys and values, no stack of parameters, no rows of other devices."""
    mesh, text, parts = runtime.mesh.shape, runtime.model.config.text, Parts(runtime, params)
    for one in result:
        parameter = one.shape in parts.layer | parts.selected
        # A vocabulary that does not divide over tensor is whole on every device; its products may be split by width.
        partial = text.vocab_size % mesh["tensor"] and one.kind == "all-reduce" and one.group == mesh["tensor"]
        whole = one.shape[-1:] == (text.vocab_size,)
        assert parameter or partial or not whole, f"logits of the whole vocabulary: {one}"
        assert len(one.shape) < 4 or one.shape[-1] != text.head_dim or is_query(one, text), f"keys and values: {one}"
        assert one.kind != "all-to-all", one
        # The table of embeddings, which may lie in parts over tensor, is `embed/embed`.
        picked = "QwenVL.embed" in one.where and "embed/embed" not in one.where and "gather" in one.where
        assert not picked, f"visual tokens of other devices' rows: {one}"
        if one.kind == "all-gather":
            assert (
                (mesh["fsdp"] > 1 and one.shape in parts.layer and is_of_parameter(one))
                or (text.num_kv_heads % mesh["tensor"] and (is_query(one, text) or one.shape in parts.whole))
                or math.prod(one.shape) <= FEW
            ), f"an accidental gather: {one}"


def is_of_parameter(one):
    """Inside the model named by the product or sum that takes a parameter, by the slice that gives it, or by what asks
    for it whole."""
    return "QwenVL" not in one.where or one.where.endswith(("dot_general", "add", SLICE, WHOLE))


def is_query(one, text):
    """Queries, or one number for each, of the heads that share a key head.

    Where tensor has more devices than there are key heads, plain XLA attention gathers them: it works by key heads.
    """
    shared = text.num_heads // text.num_kv_heads
    return "layers/attn/" in one.where and (one.shape[-1] == shared or one.shape[-2:] == (shared, text.head_dim))


def in_layers(result, kind, path):
    """The collectives of one product in the decoder's layers."""
    return [one for one in result if one.kind == kind and f"layers/{path}" in one.where]


def check_layers(result, runtime):
    """In every layer: parameters whole over fsdp for their product, and sums of partial products over tensor."""
    mesh, text = runtime.mesh.shape, runtime.model.config.text
    gate = (text.hidden_size, text.intermediate_size // mesh["tensor"])
    gathers = in_layers(result, "all-gather", "mlp/gate/dot_general")
    gathers += [one for one in result if one.kind == "all-gather" and one.shape == gate and one.where.endswith(SLICE)]
    assert bool(gathers) == (mesh["fsdp"] > 1), gathers
    assert all(one.group == mesh["fsdp"] and "while/body" in one.where for one in gathers), gathers
    for path, size in (("attn/o", text.num_heads), ("mlp/down", text.intermediate_size)):
        sums = [one for one in in_layers(result, "all-reduce", f"{path}/dot_general") if "transpose" not in one.where]
        divides = mesh["tensor"] > 1 and size % mesh["tensor"] == 0
        assert bool(sums) == divides, (path, sums)
        widths = (text.hidden_size, runtime.options.lora.rank)
        assert all(one.group == mesh["tensor"] and one.shape[-1] in widths for one in sums), sums


def check_sampler(text, runtime, params):
    """See the module."""
    result = sent(text)
    check_gathers(result, runtime, params)
    check_layers(result, runtime)
    # What looks again copies from the row's own prompt: beside the layers' own traffic only embeddings are looked up.
    for one in result:
        if "insertions/" in one.where and "QwenVL.decode" not in one.where:
            assert "embed/embed/dot_general" in one.where or math.prod(one.shape) <= 1, f"rows that wait: {one}"
    # Between devices that have other rows nothing is summed; they only agree on when a loop ends.
    rows = runtime.mesh.shape["data"] * runtime.mesh.shape["fsdp"]
    for one in result:
        if one.kind == "all-reduce" and one.group == rows != runtime.mesh.shape["tensor"]:
            assert one.shape == (), f"rows meet: {one}"


def check_update(text, runtime, params):
    """See the module."""
    result = sent(text)
    check_gathers(result, runtime, params)
    check_layers(result, runtime)
    # The gradients of gate and up, or of their adapters B, are summed over all rows. The CPU's compiler writes a
    # reduce-scatter as an all-reduce and a slice; over data and fsdp it is one sum or one after the other.
    mesh, text, rank = runtime.mesh.shape, runtime.model.config.text, runtime.options.lora.rank
    width = text.intermediate_size // (mesh["tensor"] if text.intermediate_size % mesh["tensor"] == 0 else 1)
    shapes = {(rank, width)} if rank else {(text.hidden_size // n, width) for n in (1, mesh["fsdp"])}
    sums = [
        one
        for one in result
        if one.kind in ("all-reduce", "reduce-scatter") and "transpose" in one.where and one.shape in shapes
    ]
    devices = mesh["data"] * mesh["fsdp"]
    assert math.prod(one.group for one in sums) == devices**2, f"gradients are not summed over {devices}: {sums}"


def check_layouts(state, shardings, first, runtime):
    """The state lies as it should, parameters are split over fsdp and tensor, and moments as their parameters."""
    for leaf, layout in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim), (leaf.sharding, layout)
    mesh, text, layers = runtime.mesh.shape, runtime.model.config.text, state.params["decoder"]["layers"]
    own = lambda leaf: leaf.addressable_shards[0].data.shape  # noqa: E731
    over = lambda size: mesh["tensor"] if size % mesh["tensor"] == 0 else 1  # noqa: E731
    sides = (("q", text.num_heads), ("k", text.num_kv_heads))
    kernels = [(layers["attn"][name], over(heads)) for name, heads in sides]
    for leaves, tensor in [*kernels, (layers["mlp"]["gate"], over(text.intermediate_size))]:
        _, into, out = leaves["kernel"].shape
        assert own(leaves["kernel"])[1:] == (into // mesh["fsdp"], out // tensor), own(leaves["kernel"])
        if "lora_a" in leaves:
            assert own(leaves["lora_a"])[1] == into // mesh["fsdp"] and own(leaves["lora_b"])[2] == out // tensor
    params = flatten_dict(state.params)
    for path, moment in flatten_dict(first).items():
        assert own(moment) == own(params[path]), f"a moment that lies as {own(moment)}: {path}"


def check_memory(update, old, new, first):
    """The new state takes the old one's place, and beside the parameters there are two moments of what is trained."""
    local = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "the old state is still there"
    assert update.memory_analysis().alias_size_in_bytes >= local(new), "the new state is written beside the old one"
    assert local([x for x in jax.tree.leaves(new.opt_state) if x.ndim]) == 2 * local(first)
