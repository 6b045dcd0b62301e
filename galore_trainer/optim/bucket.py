"""Equal pieces that are moved together: their tensors joined along the first dimension, blocks.

Joining is for the device: one launch for many equal weights. State stays with each weight and is written in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, widen
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import NOISE, Stored, decode, decode_basis, encode, encode_basis
from galore_trainer.core.scaled import noise_of
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.core.streams import stream
from galore_trainer.optim.kept import KeptGradient, norms_of_tensors
from galore_trainer.optim.local import AGE, Piece

Item = TypeVar("Item")

STACK_ELEMENTS = 1 << 26  # gradient entries of equal matrices that are joined in one go on an accelerator
REFRESH_ELEMENTS = 1 << 28  # the same for new bases, where whole gradients are not copied for them
PROJECTED = 16  # an entry of R weighs as much as so many entries of G
BASIS, SCALE = "basis", "_scale"
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""Keys of a piece's moments, and whether they have a sign."""


class Bucket:
    """Pieces with equal ``Piece.key``.

    Attributes:
        pieces: at least one.
        matrix, group, device: of each of them.
        dtype: of the step, and of state in 32 bits.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        first = pieces[0]
        self.pieces, self.matrix, self.group = pieces, first.matrix, first.owner.group
        self.device, self.dtype = first.weight.device, compute_dtype(first.weight.dtype)
        self.places: Any = None  # where its tensors lie, for kernels
        self.norms: Tensor | None = None  # squared, of the gradients' lines, for the scaled residual
        self.factors: tuple[Tensor, Tensor] | None = None  # of these lines, where kernels made them with N
        self.projected: tuple[Tensor, Tensor] | None = None  # R and ok, while ``clipping`` holds them
        self._supports: dict[str, Support] = {}

    @property
    def names(self) -> list[str]:
        """Logical names of the pieces."""
        return [piece.name for piece in self.pieces]

    def let_go(self) -> None:
        """Hold nothing that ``LocalWeight.open`` copied; before it can move, its pieces have to be opened again."""
        self.pieces = [p._replace(weight=p.owner.weight, grad=p.owner.grad) for p in self.pieces]
        self.places = None
        self.drop_copies()

    def drop_copies(self) -> None:
        """Free joined gradients and bases; they are joined again where they are needed again."""
        for name in ("G", "P"):
            self.__dict__.pop(name, None)
        if self.places is not None:
            self.places.drop_copies()

    def take_projected(self) -> tuple[Tensor, Tensor] | None:
        """R and ok where they were held, which ends here; else None."""
        projected, self.projected = self.projected, None
        return projected

    def end_step(self) -> None:
        """Free what was made of this step's gradients; the tables stay."""
        self.norms, self.factors, self.projected = None, None, None
        self.drop_copies()

    @functools.cached_property
    def ok(self) -> Tensor | None:
        """[pieces], 1.0 or 0.0, where flags were known before the step; else None."""
        flags = [piece.owner.ok for piece in self.pieces if piece.owner.ok is not None]
        return torch.stack(flags) if flags else None

    @property
    def clip(self) -> Tensor | None:
        """The factor of clipping; None is 1."""
        return self.pieces[0].owner.clip

    def clipped(self, x: Tensor) -> Tensor:
        """What is linear in the gradient, as it enters the moments."""
        return x if self.clip is None else x * self.clip

    def energies(self) -> Tensor:
        """||G||^2 of every piece, [pieces], float64: from the norms of lines where there are some."""
        if self.norms is not None:
            return self.norms.reshape(len(self.pieces), -1).sum(dim=1, dtype=torch.float64)
        return torch.stack(norms_of_tensors([piece.grad for piece in self.pieces])).double().square()

    @property
    def is_kept(self) -> bool:
        """Whether layer-wise mode kept the gradients, and they are not whole."""
        return self.pieces[0].kept is not None

    @property
    def noise(self) -> float:
        """What rounding leaves of a line that the projection does not see, as a share of the line's norm."""
        size = self.matrix.basis_shape[1]
        return noise_of(self.pieces[0].owner.made_in, self.matrix.rank, size)

    # ------------------------------------------------------------------ gradients

    def gradients(self) -> list[Tensor]:
        """[blocks, rows, n] of every piece, where they lie; none where they were not kept whole."""
        return [piece.matrix.take(piece.grad) for piece in self.pieces if piece.kept is None]

    @functools.cached_property
    def G(self) -> Tensor | None:
        """[pieces x blocks, rows, n]: a view for a single piece, else a copy; None where they were not kept whole."""
        return None if self.is_kept else _join(self.gradients())

    @functools.cached_property
    def P(self) -> Tensor:
        """The bases that the pieces have in this step; see ``get_basis``."""
        return self.get_basis()

    def kept(self, part: Callable[[KeptGradient], Tensor | None]) -> Tensor:
        """A tensor that layer-wise mode kept of every gradient, joined and scaled; ``part`` chooses it."""
        grads: list[Any] = [piece.kept for piece in self.pieces]
        factor = grads[0].factor
        if any(grad.factor is not factor for grad in grads):
            for grad in grads:
                grad.settle_factor()
            factor = None
        joined = _join([tensor for grad in grads if (tensor := part(grad)) is not None])
        return joined if factor is None else joined * factor

    def support(self, key: str) -> Support:
        """The positions that are stored under a key, widened once a step."""
        if key not in self._supports:
            self._supports[key] = Support(self.get(key), self.matrix.columns).wide()
        return self._supports[key]

    def gradient_at(self, key: str) -> Tensor:
        """G at the positions that are stored under a key, in their shape."""
        return self.kept(lambda grad: grad.sampled) if self.G is None else widen(read_at(self.G, self.support(key)))

    # ------------------------------------------------------------------ state

    def has(self, key: str) -> bool:
        """Whether the state of the pieces holds this key."""
        first = self.pieces[0]
        return first.prefix + key in first.owner.state

    def stored(self, key: str) -> list[Tensor]:
        """A state tensor [blocks, ...] of every piece, as it is stored."""
        return [piece.owner.state[piece.prefix + key] for piece in self.pieces]

    def stored_contiguous(self, key: str) -> list[Tensor]:
        """``stored``, for kernels that write there: what a checkpoint left with gaps between blocks is closed up."""
        for piece, value in zip(self.pieces, self.stored(key), strict=True):
            if not value.is_contiguous():
                piece.owner.state[piece.prefix + key] = value.contiguous()
        return self.stored(key)

    def get(self, key: str) -> Tensor:
        """``stored``, joined."""
        return _join(self.stored(key))

    def put(self, key: str, value: Tensor) -> None:
        """Store [pieces x blocks, ...]: in place where the key exists in this shape and dtype."""
        parts, keys = self.split(value), [piece.prefix + key for piece in self.pieces]
        for piece, name, part in zip(self.pieces, keys, parts, strict=True):
            old = piece.owner.state.get(name)
            if old is not None and old.shape == part.shape and old.dtype == part.dtype:
                if old is not part:
                    old.copy_(part)
            else:
                piece.owner.state[name] = part.clone() if len(self.pieces) > 1 else part

    def pop(self, key: str) -> Tensor:
        """``get``, and remove the key."""
        value = self.get(key)
        for piece in self.pieces:
            del piece.owner.state[piece.prefix + key]
        return value

    def ages(self, key: str = AGE) -> Tensor:
        """The age of the moments of every piece's weight before this step, [pieces x blocks, 1, 1]."""
        return self.spread(torch.stack([piece.owner.state[key] for piece in self.pieces]))

    def get_moment(self, key: str, *, signed: bool) -> Tensor:
        """A moment of every piece, joined, in the bucket's dtype."""
        return decode(self._stored_moment(key), signed=signed).to(self.dtype)

    def put_moment(self, key: str, value: Tensor, *, signed: bool, ok: Tensor | None = None, purpose: str = "") -> None:
        """Store a moment in as many bits as the group says.

        Args:
            key: of the state.
            value: [pieces x blocks, ...], in the bucket's dtype.
            signed: as in ``encode``.
            ok: [pieces x blocks, 1, 1], 0.0 where what is stored shall stay, bit for bit; None changes all.
            purpose: tells random streams apart where a key is stored twice in a step.
        """
        bits = self.group["galore"]["state_bits"]
        if bits == 32:
            self.put(key, value)
            return
        new = encode(value, bits, self._noise(key + purpose, value), signed=signed)
        if ok is not None:
            values, scale = self._stored_moment(key)
            new = Stored(
                torch.where(ok > 0.0, new.values, values),
                None if scale is None or new.scale is None else torch.where(ok[:, 0] > 0.0, new.scale, scale),
            )
        self.put(key, new.values)
        if new.scale is not None:
            self.put(key + SCALE, new.scale)

    def stored_bases(self, key: str = BASIS) -> Tensor | None:
        """The bases as they are stored, or their scales, joined; None for scales that are not there."""
        stored = [basis for piece in self.pieces if (basis := piece.basis(key)) is not None]
        return _join(stored) if stored else None

    def get_basis(self) -> Tensor:
        """The bases in the bucket's dtype, [pieces x blocks, ...]."""
        stored = Stored(self.stored_bases(), self.stored_bases(BASIS + SCALE))  # type: ignore[arg-type]
        return decode_basis(stored).to(self.dtype)

    def put_basis(self, P: Tensor) -> Tensor:
        """Store bases in as many bits as the group says; what was stored, in the bucket's dtype.

        Contiguous: products round by the strides of their factors, and not every checkpoint keeps strides.
        """
        stored = encode_basis(P.contiguous(), self.group["galore"]["basis_bits"])
        self.put(BASIS, stored.values)
        if stored.scale is not None:
            self.put(BASIS + SCALE, stored.scale)
        return decode_basis(stored).to(self.dtype)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """Zeros [pieces x blocks, ...] for a shape [blocks, ...] of one piece."""
        return torch.zeros(len(self.pieces) * shape[0], *shape[1:], dtype=self.dtype, device=self.device)

    def spread(self, by_piece: Tensor) -> Tensor:
        """[pieces] to [pieces x blocks, 1, 1]."""
        return by_piece.view(-1, 1).expand(-1, self.matrix.blocks).reshape(-1, 1, 1)

    def split(self, value: Tensor) -> Sequence[Tensor]:
        """[pieces x blocks, ...] into one tensor a piece."""
        return (value,) if len(self.pieces) == 1 else value.split(self.matrix.blocks)

    def _stored_moment(self, key: str) -> Stored:
        return Stored(self.get(key), self.get(key + SCALE) if self.has(key + SCALE) else None)

    def _noise(self, key: str, value: Tensor) -> Tensor:
        """Rounding noise in the shape of ``value``, drawn for each piece by itself."""
        seed, shape = self.group["galore"]["seed"], (self.matrix.blocks, *value.shape[1:])
        draws = (stream(self.device, seed, piece.name, key, piece.owner.state["calls"]) for piece in self.pieces)
        noise = [torch.randint(0, NOISE, shape, generator=g, device=self.device, dtype=torch.int32) for g in draws]
        return _join(noise)


def make_buckets(pieces: Iterable[Piece], max_elements: int) -> Iterator[Bucket]:
    """Buckets of equal pieces, in the order of their first pieces, each of at most ``max_elements`` ``entries``."""
    by_key: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key(), []).append(piece)
    for members in by_key.values():
        size = max(1, max_elements // entries(members[0].matrix))
        for start in range(0, len(members), size):
            yield Bucket(members[start : start + size])


def bucket_elements(device: torch.device, asked: int | None = None, most: int = STACK_ELEMENTS) -> int:
    """Gradient entries that are joined: many where launches cost, none on a CPU, where copies do.

    Args:
        device: of the weights.
        asked: what the user wants instead.
        most: on an accelerator.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else most


def entries(matrix: LogicalMatrix) -> int:
    """What a matrix counts for in a bucket: its entries, or, at a high rank, what is made of its projection."""
    blocks, lines, rank = matrix.moment_shape
    return max(matrix.rows * matrix.columns, PROJECTED * blocks * lines * rank)


def runs(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Consecutive items whose sizes add up to at most ``most``, at least one at a time."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + size(item) > most:
            yield run
            run, total = [], 0
        run.append(item)
        total += size(item)
    if run:
        yield run


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
