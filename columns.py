"""How a `ReplayBuffer` keeps its observations: every column, or only those that ever change.

`Rows` is the plain way. `LiveColumns` (--drop-constant) is the same to the buffer, takes less, and
can be skipped at first reading: 119 of Humanoid-v3's 376 columns never change.
"""

import math

import numpy as np
import torch

from quantize import Codec


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zero tensor whose pages, on the CPU, become resident only when they are first written."""
    if device.type != "cpu" or 0 in shape:  # nor can torch view an empty array
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would touch every page at once; numpy lacks bfloat16 and float8, hence the view.
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def put(array: torch.Tensor, rows: np.ndarray, values: torch.Tensor) -> None:
    """array[rows] = values, for values on the CPU and an array on any device."""
    array[torch.from_numpy(rows).to(array.device)] = values.to(array.device)


def _in_use(array: torch.Tensor, fill: np.ndarray) -> list[torch.Tensor]:
    """Views, as bytes, of the first fill[i] rows of every ring i in an array."""
    rings = array.view(len(fill), -1, *array.shape[1:])
    return [ring[:n].view(torch.uint8) for ring, n in zip(rings, fill.tolist(), strict=True)]


def stored(array: torch.Tensor, fill: np.ndarray) -> list[torch.Tensor]:
    """For a checkpoint: the bytes of the first fill[i] rows of every ring i, on the CPU no copy.

    `torch.save` writes whole storages; by the way through numpy a view gets one of its own.
    """
    return [torch.from_numpy(rows.cpu().numpy()) for rows in _in_use(array, fill)]


def restore(array: torch.Tensor, fill: np.ndarray, saved: list[torch.Tensor]) -> None:
    """Undo `stored`. Raises ValueError if these are other rows."""
    for rows, values in zip(_in_use(array, fill), saved, strict=True):
        if values.shape != rows.shape:  # copy_ would repeat a single one
            raise ValueError("its replay buffer has other rows than this one")
        rows.copy_(values)


class Rows:
    """A stored row for each observation.

    Args:
        codec: what a row looks like.
        num_envs, ring: rings, and rows in each.
        obs_dim: columns, n.
        device: where the rows live.
    """

    def __init__(self, codec: Codec, num_envs: int, ring: int, obs_dim: int, device: torch.device):
        self.codec, self.obs_dim = codec, obs_dim
        width, dtype = codec.row(obs_dim)
        self.array = zeros((num_envs * ring, width), dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.array.nbytes

    def put(self, rows: np.ndarray, codes: torch.Tensor) -> None:
        """Store codes (k, n) in rows (k,)."""
        put(self.array, rows, self.codec.pack(codes))

    def get(self, index: torch.Tensor) -> torch.Tensor:
        """The observations (B, n) float32 of the rows in index (B,)."""
        rows = self.array.index_select(0, index)
        return self.codec.decode(self.codec.unpack(rows, self.obs_dim))

    def state(self, fill: np.ndarray) -> dict:
        """For a checkpoint: the first fill[i] rows of every ring i."""
        return {"array": stored(self.array, fill)}

    def load(self, saved: dict, fill: np.ndarray) -> None:
        """Take over what `state` returned."""
        restore(self.array, fill, saved["array"])


class LiveColumns:
    """`Rows` that store a column only from the moment when it first changes.

    What is stored is each code's difference from its column's first one, by xor: 0 where nothing
    has changed, and lossless for codes of every dtype. The first WATCHED rows are kept whole. Then
    the columns that changed in them are laid out as one block of stored rows, and the first rows
    move there. A column that changes for the first time after that gets a lazily zeroed block of
    its own: the rows before read as its constant, without a copy and without taking memory, as the
    system gives out pages when they are first written. Each late block adds to the time of `put`
    and `get`, some 20 us; there are as many as moments at which columns joined. Arguments as of
    `Rows`; a buffer of at most WATCHED rows is never settled.

    Attributes:
        live: (n,) bool, the columns that have changed so far.
        settled: whether the watch is over. From then on only late columns add to `nbytes`.
    """

    WATCHED = 1000  # rows; on Humanoid-v3 the columns that ever change do so within 60

    def __init__(self, codec: Codec, num_envs: int, ring: int, obs_dim: int, device: torch.device):
        self.codec, self.num_envs, self.ring, self.device = codec, num_envs, ring, device
        self.integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            codec.dtype.itemsize
        ]
        self.empty = True
        self.constant = np.zeros(obs_dim, f"i{codec.dtype.itemsize}")  # the first row's codes
        self.live = np.zeros(obs_dim, bool)
        self.watched = min(ring, math.ceil(self.WATCHED / num_envs))  # of each ring
        self.whole = zeros((num_envs * self.watched, obs_dim), self.integer, device)
        self.columns = np.arange(obs_dim)  # in the order of the blocks, those in none at the end
        self.place = torch.arange(obs_dim, device=device)  # (n,) of each column in that order
        self.blocks: list[tuple[slice, torch.Tensor]] = []  # of `columns`, array; the first packed

    @property
    def settled(self) -> bool:
        return bool(self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are now."""
        arrays = [array for _, array in self.blocks] if self.settled else [self.whole]
        small = self.constant, self.live, self.columns, self.place
        return sum(array.nbytes for array in (*arrays, *small))

    def put(self, rows: np.ndarray, codes: torch.Tensor) -> None:
        """Store codes (k, n) in rows (k,)."""
        if len(rows) == 0:
            return
        bits = codes.view(self.integer).numpy()
        if self.empty:
            self.constant[:], self.empty = bits[0], False
        change = bits ^ self.constant
        changed = change.any(0)
        if not self.settled:
            if (rows % self.ring < self.watched).all():
                self.live |= changed
                put(self.whole, self._slot(rows), torch.from_numpy(change))
                return
            self._settle()
        if (changed & ~self.live).any():
            self._join(np.flatnonzero(changed & ~self.live))
        (part, block), *late = self.blocks
        put(block, rows, self._pack(change[:, self.columns[part]]))
        for part, block in late:
            put(block, rows, torch.from_numpy(change[:, self.columns[part]]))

    def get(self, index: torch.Tensor) -> torch.Tensor:
        """The observations (B, n) float32 of the rows in index (B,)."""
        if not self.settled:
            change = self.whole.index_select(0, self._slot(index))
        else:
            (part, block), *late = self.blocks
            codes = self.codec.unpack(block.index_select(0, index), part.stop)
            parts = [codes.view(self.integer), *(block.index_select(0, index) for _, block in late)]
            never = len(self.columns) - self.blocks[-1][0].stop
            parts.append(codes.new_zeros((len(index), never), dtype=self.integer))
            change = torch.cat(parts, 1)
        constant = torch.from_numpy(self.constant[self.columns]).to(self.device)
        obs = self.codec.decode(change.bitwise_xor_(constant).view(self.codec.dtype))
        return obs.index_select(1, self.place)  # in float32: 0.06 ms; int16 codes would take 0.5

    def state(self, fill: np.ndarray) -> dict:
        """For a checkpoint: the first fill[i] rows of every ring i, as far as they are stored."""
        arrays, fill = self._arrays(fill)
        return {
            "empty": self.empty,
            "constant": torch.from_numpy(self.constant.copy()),
            "live": torch.from_numpy(self.live.copy()),
            "columns": torch.from_numpy(self.columns.copy()),
            "stops": [part.stop for part, _ in self.blocks],
            "arrays": [stored(array, fill) for array in arrays],
        }

    def load(self, saved: dict, fill: np.ndarray) -> None:
        """Take over what `state` returned."""
        self.empty = saved["empty"]
        self.constant[:], self.live[:] = saved["constant"], saved["live"]
        start, columns, stops = 0, saved["columns"].numpy(), saved["stops"]
        live = np.flatnonzero(self.live)
        laid_out = np.sort(columns[: stops[-1]]) if stops else live
        if stops != sorted({int(stop) for stop in stops}) or not np.array_equal(laid_out, live):
            raise ValueError("its live columns are not those that are laid out")
        for stop in stops:
            self._add_block(columns[start:stop])
            start = stop
        arrays, fill = self._arrays(fill)
        for array, values in zip(arrays, saved["arrays"], strict=True):
            restore(array, fill, values)
        if self.settled:
            del self.whole

    def _arrays(self, fill: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        """The arrays with rows, and how many of these are in use in every ring."""
        if self.settled:
            return [block for _, block in self.blocks], fill
        return [self.whole], np.minimum(fill, self.watched)

    def _slot(self, rows):
        """Places in `whole` of rows (k,), numpy or torch."""
        return rows - rows // self.ring * (self.ring - self.watched)

    def _pack(self, change: np.ndarray) -> torch.Tensor:
        return self.codec.pack(torch.from_numpy(change).view(self.codec.dtype))

    def _settle(self) -> None:
        """Lay out the columns that are live as the first block and move the watched rows there."""
        columns = np.flatnonzero(self.live)
        block = self._add_block(columns)
        watched = self.whole.cpu().numpy().reshape(self.num_envs, self.watched, -1)
        for env, change in enumerate(watched):
            first = env * self.ring
            block[first : first + self.watched] = self._pack(change[..., columns]).to(self.device)
        del self.whole

    def _join(self, columns: np.ndarray) -> None:
        """Give columns that have just changed for the first time a block of their own."""
        self._add_block(columns)
        self.live[columns] = True

    def _add_block(self, columns: np.ndarray) -> torch.Tensor:
        """Lazily zeroed rows for these columns, packed if they are the first."""
        width, dtype = (
            (len(columns), self.integer) if self.settled else self.codec.row(len(columns))
        )
        block = zeros((self.num_envs * self.ring, width), dtype, self.device)
        start = self.blocks[-1][0].stop if self.blocks else 0
        columns_so_far = np.concatenate([self.columns[:start], columns])
        others = np.setdiff1d(self.columns, columns_so_far)
        self.columns = np.concatenate([columns_so_far, others])
        self.place = torch.from_numpy(np.argsort(self.columns)).to(self.device)
        self.blocks.append((slice(start, len(columns_so_far)), block))
        return block
