"""From an intervention and a model's map to an edit plan: every tensor to be touched, and how."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from remove_refusals.directions.intervention import check_fit
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import Share, project_out, pull_back
from remove_refusals.modelmap import DiskTensor, ModelMap, Writer
from remove_refusals.settings import EditSettings, SiteKind, Tied, Variant
from remove_refusals.types import Intervention, TiedChoice

# Read in llama.cpp at 0c1e57098 (its converter, gguf-py's MODEL_TENSORS and src/models) and in vLLM 0.33.0
# (vllm/model_executor/models), both of autumn 2026. Other types get an unembedding of its own where the files have one
# and the configuration does not tie it.
_WITHOUT_HEAD = {
    "llama.cpp": "bitnet cohere cohere2 gemma gemma2 lfm2_moe",
    "vLLM": "cohere cohere2 cohere2_moe cohere_compass_text gemma2 gemma3n_text zamba2",
}
"""The types of language models whose unembedding is the embedding whatever the files hold, or which are not loaded."""


def tied_choice(model_map: ModelMap, asked: Tied) -> TiedChoice:
    """Say what happens to a tied embedding."""
    servers = [name for name, types in _WITHOUT_HEAD.items() if model_map.text_type in types.split()]
    if asked != "auto":
        return TiedChoice(asked=asked, done=asked, why="it was asked for")
    if servers:
        why = f"in {' and '.join(servers)} {model_map.text_type} has no unembedding of its own"
        return TiedChoice(asked=asked, done="both", why=why)
    return TiedChoice(asked=asked, done="untie", why="no server is known to drop an unembedding of its own")


def check_exact(model_map: ModelMap, *, allow_leak: bool = False) -> None:
    """Check that an edit of a model's weights is exact, unless one that leaks is allowed."""
    if model_map.leaks and not allow_leak:
        raise ArchitectureError(
            f"No weight edit of model type '{model_map.model_type}' is exact ({model_map.leaks[0].rstrip('.')}), "
            "expected one that is; use hooks (chat, generate), or pass --allow-leak and read the measured leak."
        )


@dataclass(frozen=True, eq=False)
class ExpertPart:
    """What is taken out of one expert before anything else: a share of a subspace, or with no basis of all of it."""

    expert: int
    strength: float
    basis: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class PlanEntry:
    """One tensor to be edited: `W' = W - strength * basis (basisᵀ W)` along `axis`, its axis of width d_model.

    The basis, `[d_model, k]`, float32, orthonormal, is the direction, pulled back through the steps behind the writer.
    `on_disk` is where the files hold it, as far as there are files. Of `n_experts` one behind the other along the first
    axis some may have `parts` of their own; `part` is that of an entry for one expert alone.
    """

    parameter: str
    kind: SiteKind
    layer: int | None
    axis: int
    shape: tuple[int, ...]
    strength: float
    basis: torch.Tensor
    on_disk: tuple[DiskTensor, ...] = ()
    n_experts: int = 0
    parts: tuple[ExpertPart, ...] = ()
    part: ExpertPart | None = None

    @property
    def first(self) -> tuple[Share, ...]:
        """What is taken out of an expert before the rest, as `project_out` takes it."""
        return () if self.part is None else ((self.part.basis, self.part.strength),)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is taken out."""
        return self.strength == 0 and self.part is None and not self.parts

    def of_expert(self, expert: int) -> "PlanEntry":
        """Give what happens to one expert."""
        part = next((one for one in self.parts if one.expert == expert), None)
        shape = (self.shape[0] // self.n_experts, *self.shape[1:])
        return replace(self, shape=shape, n_experts=0, parts=(), part=part)

    def edited(self, tensor: torch.Tensor, variant: Variant = "plain") -> torch.Tensor:
        """Give an edited copy of the tensor."""
        whole = project_out(tensor, self.basis, self.strength, self.axis, variant, self.first)
        for part in self.parts:
            one, size = self.of_expert(part.expert), self.shape[0] // self.n_experts
            own = tensor.detach().narrow(0, part.expert * size, size)
            whole.narrow(0, part.expert * size, size).copy_(one.edited(own, variant))
        return whole


@dataclass(frozen=True, eq=False)
class EditPlan:
    """An intervention resolved against one model: every tensor to be touched, in the order of the map."""

    entries: tuple[PlanEntry, ...]
    tied: TiedChoice | None
    """What happens to the unembedding, where the embedding is edited and is also that."""
    left: tuple[tuple[str, str], ...]
    """Writers that are not touched, with the reason."""
    leaks: tuple[str, ...] = ()
    """Why the edit is not exact, if it was asked for all the same."""
    variant: Variant = "plain"

    @property
    def untie(self) -> bool:
        """Whether the unembedding gets a copy of the unedited embedding first."""
        return self.tied is not None and self.tied.done == "untie"


def resolve(
    intervention: Intervention,
    model_map: ModelMap,
    tensor_of: Callable[[str], torch.Tensor],
    settings: EditSettings | None = None,
) -> EditPlan:
    """Resolve an intervention against one model; of `tensor_of` only norm gains are asked, by their names in the model.

    An edit of strength 0 is listed under `left`, as is every writer of a site without an edit. What is taken out where
    is the intervention's; of the settings the rest counts.
    """
    settings = settings or EditSettings()
    check_fit(intervention, model_map)
    check_exact(model_map, allow_leak=settings.allow_leak)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits if edit.expert is None}
    entries: dict[str, PlanEntry] = {}
    left: list[tuple[str, str]] = []
    for site in model_map.sites:
        edit = edits.get((site.kind, site.layer))
        for writer in site.writers:
            n_experts, parts = _parts(intervention, model_map, site.layer, writer, tensor_of)
            unedited = edit is None or edit.strength == 0
            if unedited and not parts:
                left.append((writer.parameter, "not selected" if edit is None else "strength 0"))
                continue
            if edit is None or edit.strength == 0:
                strength, basis = 0.0, torch.empty(model_map.d_model, 0)
            else:
                strength = edit.strength
                basis = pull_back(intervention.directions[edit.direction].basis, writer.steps, tensor_of)
            entry = PlanEntry(
                parameter=writer.parameter,
                kind=site.kind,
                layer=site.layer,
                axis=writer.axis,
                shape=writer.shape,
                strength=strength,
                basis=basis,
                n_experts=n_experts,
                parts=parts,
            )
            known = entries.setdefault(writer.parameter, entry)
            if known.strength != entry.strength or not torch.equal(known.basis, entry.basis):
                raise ArchitectureError(
                    f"Parameter '{writer.parameter}' writes to the residual stream at two sites that want two "
                    "different edits, expected one edit per tensor; use the same strength and direction for both."
                )
    is_tied = model_map.tied and model_map.input_embedding in entries
    tied = tied_choice(model_map, settings.tied) if is_tied else None
    return EditPlan(tuple(entries.values()), tied, tuple(left), model_map.leaks, settings.variant)


def _parts(
    intervention: Intervention,
    model_map: ModelMap,
    layer: int | None,
    writer: Writer,
    tensor_of: Callable[[str], torch.Tensor],
) -> tuple[int, tuple[ExpertPart, ...]]:
    """Give how many experts a writer holds, and what is taken out of single ones."""
    mixture = next((one for one in model_map.mixtures if one.layer == layer and writer in one.writers), None)
    if mixture is None:
        return 0, ()
    parts = []
    for edit in intervention.edits:
        if edit.expert is not None and edit.layer == layer and edit.strength != 0:
            direction = None if edit.whole else intervention.directions[edit.direction].basis
            basis = None if direction is None else pull_back(direction, writer.steps, tensor_of)
            parts.append(ExpertPart(edit.expert, edit.strength, basis))
    return mixture.n_experts, tuple(sorted(parts, key=lambda part: part.expert))
