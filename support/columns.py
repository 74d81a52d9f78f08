"""How a `ReplayBuffer` keeps its observations: every column, or only those that ever change.

`Rows` is the plain way. `LiveColumns` (--drop-constant) is the same to the buffer, takes less, and
can be skipped at first reading: 119 of Humanoid-v3's 376 columns never change.
"""

import math

import numpy as np
import torch

from quantize import Codec

NUMPY_LACKS = (torch.bfloat16, torch.float8_e4m3fn)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def columns_of(mask: np.ndarray, most: int = 12) -> str:
    """The indices where mask (n,) is true, e.g. "[3, 7]"; a long list is shortened and counted."""
    indices = np.flatnonzero(mask).tolist()
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{indices[:most]}{more}"


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zero tensor whose pages, on the CPU, become resident only when they are first written."""
    if device.type != "cpu" or 0 in shape:  # nor can torch view an empty array
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would touch every page at once; numpy lacks bfloat16 and float8, hence the view.
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def put(array: torch.Tensor, rows: np.ndarray, values: np.ndarray | torch.Tensor) -> None:
    """array[rows] = values, for values on the CPU and an array on any device.

    Here and in `take` numpy is faster than torch, by some 30 us for the four arrays of one step.
    """
    if array.device.type == "cpu" and array.dtype not in NUMPY_LACKS:
        array.numpy()[rows] = values
    else:
        array[torch.from_numpy(rows).to(array.device)] = torch.as_tensor(values).to(array)


def take(array: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """array[rows], on its device."""
    if array.device.type == "cpu" and array.dtype not in NUMPY_LACKS:
        return torch.from_numpy(array.numpy().take(rows, 0))
    return array.index_select(0, torch.from_numpy(rows).to(array.device))


def _in_use(array: torch.Tensor, fill: list[int]) -> list[torch.Tensor]:
    """Views, as bytes, of the first fill[i] rows of every ring i in an array."""
    rings = array.view(len(fill), -1, *array.shape[1:])
    return [ring[:n].view(torch.uint8) for ring, n in zip(rings, fill, strict=True)]


def stored(array: torch.Tensor, fill: list[int]) -> list[torch.Tensor]:
    """For a checkpoint: the bytes of the first fill[i] rows of every ring i, not copied on the CPU.

    `torch.save` writes a view's whole storage; a view that went through numpy has one of its own.
    """
    return [torch.from_numpy(rows.cpu().numpy()) for rows in _in_use(array, fill)]


def restore(array: torch.Tensor, fill: list[int], saved: list[torch.Tensor]) -> None:
    """Undo `stored`. Raises ValueError if these are other rows."""
    for rows, values in zip(_in_use(array, fill), saved, strict=True):
        if values.shape != rows.shape:  # copy_ would repeat a single one
            raise ValueError("its replay buffer has other rows than this one")
        rows.copy_(values)


class Rows:
    """A row for each observation.

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

    def get(self, rows: np.ndarray) -> torch.Tensor:
        """The observations (B, n) float32 in rows (B,)."""
        codes = self.codec.unpack(take(self.array, rows), self.obs_dim)
        return self.codec.decode(codes)

    def state_dict(self, fill: list[int]) -> dict:
        """For a checkpoint: the first fill[i] rows of every ring i."""
        return {"array": stored(self.array, fill)}

    def load_state_dict(self, saved: dict, fill: list[int]) -> None:
        """Take over what `state_dict` returned."""
        restore(self.array, fill, saved["array"])


class LiveColumns:
    """`Rows` that store a column only from the moment when it first changes.

    What is stored is each code's difference from its column's first one, by xor: 0 where nothing
    has changed, and lossless for codes of every dtype. The first WATCHED rows are kept whole. Then
    the columns that changed in them are laid out as one block of rows, and the first rows move
    there. A column that changes for the first time after that gets a lazily zeroed block of its
    own: the rows before read as its constant, without a copy and without taking memory, as the
    system gives out pages when they are first written. Each late block adds to the time of `put`
    and `get`, some 20 us; there are as many as moments at which columns joined. Arguments as of
    `Rows`; a buffer of at most WATCHED rows stays whole.

    Attributes:
        live: (n,) bool, the columns that have changed so far.
        watching: whether rows are still kept whole. Afterwards only late columns add to `nbytes`.
    """

    WATCHED = 1000  # rows; on Humanoid-v3 the columns that ever change do so within 60

    def __init__(self, codec: Codec, num_envs: int, ring: int, obs_dim: int, device: torch.device):
        self.codec, self.num_envs, self.ring, self.device = codec, num_envs, ring, device
        size = codec.dtype.itemsize
        self.integer = INTEGERS[size]
        self.empty = True
        self.constant = np.zeros(obs_dim, f"i{size}")  # the first row's codes
        self.live = np.zeros(obs_dim, bool)
        self.watched = min(ring, math.ceil(self.WATCHED / num_envs))  # of each ring
        self.whole = zeros((num_envs * self.watched, obs_dim), self.integer, device)
        self.columns = np.arange(obs_dim)  # in the order of the blocks, those in none at the end
        self.rank = torch.arange(obs_dim, device=device)  # (n,) of each column in that order
        self.blocks: list[tuple[slice, torch.Tensor]] = []  # of `columns`, array; the first packed

    @property
    def watching(self) -> bool:
        return not self.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are now."""
        arrays = [self.whole] if self.watching else [array for _, array in self.blocks]
        return sum(array.nbytes for array in arrays) + self._overhead

    def bytes_when(self, live_columns: int, late_columns: int = 0) -> int:
        """The largest that `nbytes` gets if so many columns change in the watched rows and later.

        Works on the meta device.
        """
        width, dtype = self.codec.row(live_columns)
        row = width * dtype.itemsize + late_columns * self.integer.itemsize
        return max(self.num_envs * self.ring * row, self.whole.nbytes) + self._overhead

    @property
    def _overhead(self) -> int:
        small = self.constant, self.live, self.columns, self.rank
        return sum(array.nbytes for array in small)

    def put(self, rows: np.ndarray, codes: torch.Tensor) -> None:
        """Store codes (k, n) in rows (k,)."""
        if len(rows) == 0:
            return
        codes = codes.view(self.integer).numpy()
        if self.empty:
            self.constant[:], self.empty = codes[0], False
        change = codes ^ self.constant
        changed = change.any(0)
        if self.watching:
            if (rows % self.ring < self.watched).all():
                self.live |= changed
                put(self.whole, self._watched_row(rows), change)
                return
            self._end_watch()
        joining = np.flatnonzero(changed & ~self.live)
        if len(joining):
            self._add_block(joining)
            self.live[joining] = True
        (part, block), *late = self.blocks
        put(block, rows, self._pack(change[:, self.columns[part]]))
        for part, block in late:
            put(block, rows, change[:, self.columns[part]])

    def get(self, rows: np.ndarray) -> torch.Tensor:
        """The observations (B, n) float32 in rows (B,)."""
        if self.watching:
            change = take(self.whole, self._watched_row(rows))
        else:
            (part, block), *late = self.blocks
            codes = self.codec.unpack(take(block, rows), part.stop)
            parts = [codes.view(self.integer), *(take(block, rows) for _, block in late)]
            never = len(self.columns) - self.blocks[-1][0].stop
            parts.append(codes.new_zeros((len(rows), never), dtype=self.integer))
            change = torch.cat(parts, 1)
        constant = torch.from_numpy(self.constant[self.columns]).to(self.device)
        obs = self.codec.decode(change.bitwise_xor_(constant).view(self.codec.dtype))
        return obs.index_select(1, self.rank)  # in float32: 0.06 ms; int16 codes would take 0.5

    def state_dict(self, fill: list[int]) -> dict:
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

    def load_state_dict(self, saved: dict, fill: list[int]) -> None:
        """Take over what `state_dict` returned, into one that is still empty."""
        self.empty = saved["empty"]
        self.constant[:], self.live[:] = saved["constant"], saved["live"]
        start, columns = 0, saved["columns"].numpy()
        for stop in saved["stops"]:
            self._add_block(columns[start:stop])
            start = stop
        arrays, fill = self._arrays(fill)
        for array, values in zip(arrays, saved["arrays"], strict=True):
            restore(array, fill, values)
        if not self.watching:
            del self.whole

    def _arrays(self, fill: list[int]) -> tuple[list[torch.Tensor], list[int]]:
        """The arrays with rows, and how many of these are in use in every ring."""
        if self.watching:
            return [self.whole], [min(n, self.watched) for n in fill]
        return [block for _, block in self.blocks], fill

    def _watched_row(self, rows: np.ndarray) -> np.ndarray:
        """Where the rows (k,) lie in `whole`."""
        return rows - rows // self.ring * (self.ring - self.watched)

    def _pack(self, change: np.ndarray) -> torch.Tensor:
        return self.codec.pack(torch.from_numpy(change).view(self.codec.dtype))

    def _end_watch(self) -> None:
        """Lay out the columns that are live as the first block and move the watched rows there."""
        columns = np.flatnonzero(self.live)
        block = self._add_block(columns)
        watched = self.whole.cpu().numpy().reshape(self.num_envs, self.watched, -1)
        for env, change in enumerate(watched):
            first = env * self.ring
            block[first : first + self.watched] = self._pack(change[..., columns]).to(self.device)
        del self.whole

    def _add_block(self, columns: np.ndarray) -> torch.Tensor:
        """Lazily zeroed rows for these columns, packed if they are the first."""
        n, first = len(columns), not self.blocks
        width, dtype = self.codec.row(n) if first else (n, self.integer)
        block = zeros((self.num_envs * self.ring, width), dtype, self.device)
        start = 0 if first else self.blocks[-1][0].stop
        placed = np.concatenate([self.columns[:start], columns])
        self.columns = np.concatenate([placed, np.setdiff1d(self.columns, placed)])
        self.rank = torch.from_numpy(np.argsort(self.columns)).to(self.device)
        self.blocks.append((slice(start, start + n), block))
        return block
