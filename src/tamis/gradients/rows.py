"""Per-sample gradients of all trainable parameters of many rows: kept to be asked about, or summed as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tamis.gradients.held import Factored, Held, Lookups, Materialised, materialising_is_smaller
from tamis.gradients.layers import assembly_dtype, per_sample_gradient
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.per_sample import run_batch
from tamis.maths.autocast import autocast_off
from tamis.maths.low_rank import LowRank
from tamis.types import Batch, LayerSpec

__all__ = ["RowGradients", "hold_gradients", "summed_gradient", "zero_gradient"]


class RowGradients:
    """The per-sample gradients of the rows of one or several passes, by matrix; ``n`` rows in the order passed.

    Every answer is a sum over matrices, and over the layers that share a matrix, in float64.
    """

    def __init__(self, matrices: Sequence[ParamMatrix]) -> None:
        self.matrices = tuple(matrices)
        self._passes: list[Mapping[str, Held]] = []
        self._counts: list[int] = []

    def add(self, held: Mapping[str, Held], count: int) -> None:
        """The gradients of ``count`` more rows, by layer."""
        self._passes.append(held)
        self._counts.append(count)

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def nbytes(self) -> int:
        """Memory held, at most: layers with the same input share it."""
        return sum(held.nbytes for one_pass in self._passes for held in one_pass.values())

    @autocast_off()
    def dots(self, direction_of: Callable[[ParamMatrix], Tensor | LowRank]) -> Float[Tensor, " n"]:
        """``<grad l_i, M>`` with ``M`` given matrix by matrix, so that no more than one need exist at a time."""
        total: Tensor | None = None
        for matrix in self.matrices:
            direction = direction_of(matrix)
            found = self._joined(matrix, lambda held, direction=direction: held.dots(direction))  # type: ignore[misc]
            total = found if total is None else total + found
        assert total is not None
        return total

    @autocast_off()
    def weighted(self, coefficients: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """``sum_i c_i grad l_i`` by parameter name, each in its parameter's shape."""
        if not self._passes:  # of several processes, one may have no row
            return zero_gradient(self.matrices)
        parts = torch.split(coefficients, self._counts)
        found: dict[str, Tensor] = {}
        for matrix in self.matrices:
            total: Tensor | None = None
            for one_pass, part in zip(self._passes, parts, strict=True):
                for layer in matrix.layers:
                    grad = one_pass[layer.name].weighted(part)
                    total = grad if total is None else total.add_(grad.to(total.device))
            assert total is not None
            found.update(matrix.split(total))
        return found

    @autocast_off()
    def rows_of(self, matrix: ParamMatrix, first: int, stop: int) -> Float[Tensor, "n R I"]:
        """Rows ``first`` to ``stop`` of the matrix's gradient, of every sample."""
        parts = [
            _summed([one_pass[layer.name].rows(first, stop) for layer in matrix.layers]) for one_pass in self._passes
        ]
        if not parts:  # of several processes, one may have no row
            param = matrix.params[0][1]
            return param.new_zeros((0, stop - first, matrix.shape[1]), dtype=assembly_dtype(param.dtype))
        return torch.cat(parts)

    @autocast_off()
    def sketches(self, matrix: ParamMatrix, left: Tensor | None, right: Tensor | None) -> Float[Tensor, "n K"]:
        """The matrix's gradient projected from both sides, of every sample."""
        parts = [
            _summed([one_pass[layer.name].sketch(left, right) for layer in matrix.layers]) for one_pass in self._passes
        ]
        if not parts:  # of several processes, one may have no row
            param = matrix.params[0][1]
            outs, ins = (
                size if side is None else side.shape[1] for size, side in zip(matrix.shape, (left, right), strict=True)
            )
            return param.new_zeros((0, outs * ins), dtype=assembly_dtype(param.dtype))
        return torch.cat(parts)

    def factors(self, layer: LayerSpec) -> list[Factored]:
        """The factors of a linear layer, pass by pass; only if they were to be kept."""
        found = [one_pass[layer.name] for one_pass in self._passes]
        assert all(isinstance(held, Factored) for held in found), "made with keep_factors=False"
        return [held for held in found if isinstance(held, Factored)]

    def _joined(self, matrix: ParamMatrix, ask: Callable[[Held], Tensor]) -> Tensor:
        parts = [
            _summed([ask(one_pass[layer.name]).double().cpu() for layer in matrix.layers]) for one_pass in self._passes
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def zero_gradient(matrices: Sequence[ParamMatrix]) -> dict[str, Tensor]:
    """What ``summed_gradient`` would return of no row, in its types: another process may have some."""
    return {
        name: torch.zeros_like(param, dtype=assembly_dtype(param.dtype))
        for matrix in matrices
        for name, param in matrix.params
    }


def hold_gradients(
    model: nn.Module,
    batch: Batch,
    rows: RowGradients,
    *,
    keep_factors: bool = False,
    target_rank: int | None = None,
) -> Float[Tensor, " B"]:
    """One frozen forward and backward pass whose per-sample gradients are added to ``rows``; the losses, finite or not.

    Held in the smaller form, but as factors everywhere with ``keep_factors``, and where a direction is cut to
    ``target_rank``: to form a gradient takes the very product that such a direction saves. A row without finite loss
    has gradients that are not finite; give it the coefficient 0.
    """
    consumer = _Holding(model, rows.matrices, keep_factors=keep_factors, target_rank=target_rank)
    layers = [layer for matrix in rows.matrices for layer in matrix.layers]
    losses = run_batch(model, batch, layers, consumer, require_finite_losses=False)
    rows.add(consumer.held, len(losses))
    return losses


def summed_gradient(
    model: nn.Module,
    matrices: Sequence[ParamMatrix],
    batches: Sequence[tuple[Batch, Float[Tensor, " B"]]],
) -> tuple[dict[str, Tensor], Float[Tensor, " n"]]:
    """``sum_i c_i grad l_i`` by parameter name, and the losses; nothing is kept but the sum.

    Raises:
        NonFinite: a loss is NaN or infinite.
    """
    layers = [layer for matrix in matrices for layer in matrix.layers]
    total: dict[str, Tensor] = {}
    losses = []
    for batch, coefficients in batches:
        consumer = _Summing(model, matrices, coefficients, total)
        losses.append(run_batch(model, batch, layers, consumer).double().cpu())
    found: dict[str, Tensor] = {}
    for matrix in matrices:
        found.update(matrix.split(total[matrix.name]))
    return found, torch.cat(losses)


class _Holding:
    """Keeps every layer's gradients in the smaller form."""

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[ParamMatrix],
        *,
        keep_factors: bool = False,
        target_rank: int | None = None,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._matrix_of = {layer.name: matrix for matrix in matrices for layer in matrix.layers}
        self._as_factors = {
            layer.name for m in matrices if keep_factors or m.is_cut_to(target_rank) for layer in m.layers
        }
        self.held: dict[str, Held] = {}

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        """The input (or the ids looked up) as it is."""
        return (act,)

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """One layer."""
        self.held[layer.name] = self._form(layer, kept[0], grad_out)

    def _form(self, layer: LayerSpec, act: Tensor, grad_out: Tensor) -> Held:
        if layer.kind == "vector":
            leaves = [name.rpartition(".")[2] for name, _ in self._matrix_of[layer.name].params]
            return Materialised(_run_again(self._modules[layer.name], leaves, act, grad_out)[:, :, None])
        if layer.kind == "embedding":
            # A head that shares the table may have a bias, a column to which looking up adds nothing.
            missing = self._matrix_of[layer.name].shape[1] - layer.in_features
            grads = torch.nn.functional.pad(grad_out, (0, missing)) if missing else grad_out
            return Lookups(act, grads, table_rows=layer.out_features)
        if layer.name not in self._as_factors and materialising_is_smaller(act, grad_out, has_bias=layer.has_bias):
            return Materialised(per_sample_gradient(act, grad_out, has_bias=layer.has_bias))
        return Factored(act, grad_out, has_bias=layer.has_bias)


class _Summing(_Holding):
    """Adds every layer's weighted gradient to a running total and forgets the layer."""

    def __init__(
        self, model: nn.Module, matrices: Sequence[ParamMatrix], coefficients: Tensor, total: dict[str, Tensor]
    ) -> None:
        super().__init__(model, matrices, keep_factors=True)
        self._coefficients, self._total = coefficients, total

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        """One layer."""
        grad = self._form(layer, kept[0], grad_out).weighted(self._coefficients)
        name = self._matrix_of[layer.name].name
        self._total[name] = self._total[name].add_(grad) if name in self._total else grad


class _Bare(nn.Module):
    """A module without its hooks: the taps must not see it run again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, act: Tensor) -> Tensor:
        result: Tensor = self.inner.forward(act)
        return result


def _run_again(module: nn.Module, leaves: Sequence[str], act: Tensor, grad_out: Tensor) -> Float[Tensor, "B P"]:
    """Per-sample gradients of a module's own parameters, by running it alone, row by row, on the input it had.

    Exact for any module that treats rows apart: the gradient of ``l_b`` is the vector-Jacobian product of the module at
    ``act_b`` with ``grad_out_b``.
    """
    dtype = assembly_dtype(act.dtype)
    values = {leaf: getattr(module, leaf).detach().to(dtype) for leaf in leaves}
    bare = _Bare(module)

    def output(values: dict[str, Tensor], row: Tensor) -> Tensor:
        named = {f"inner.{leaf}": value for leaf, value in values.items()}
        result: Tensor = torch.func.functional_call(bare, named, (row[None],))[0]
        return result

    def pull_back(row: Tensor, grad: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda values: output(values, row), values)[1]
        (found,) = pull(grad)
        return torch.cat([found[leaf].flatten() for leaf in values])

    grads: Tensor = torch.func.vmap(pull_back)(act.to(dtype), grad_out.to(dtype))
    return grads


def _summed(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
