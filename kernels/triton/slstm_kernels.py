# mypy: ignore-errors
# ruff: noqa: PLR0917 - a launch passes by position
"""The sLSTM's device code; ``slstm.py`` launches it, ``kernels/slstm.py`` has the formulas.

A program takes one head and a block of sequences, longest first, and walks along time; a sequence that has ended keeps
its state. Gates are [tokens, 4, heads, DIM], cells [tokens, heads, DIM], states [sequences, heads, DIM], in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _matrix(recurrent, gate, head, heads, out, into, DIM: tl.constexpr):
    """Load part of one head's matrix [out, in] of a gate."""
    at = ((gate * heads + head) * DIM + out)[:, None] * DIM + into
    return tl.load(recurrent + at, mask=(out < DIM)[:, None] & (into < DIM), other=0.0)


@triton.jit
def _recur(sum, hidden, y, rows, exists, recurrent, gate: tl.constexpr, head, heads, DIM: tl.constexpr,
           BLOCK: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Return sum + hidden @ R^T; a wide head reads ``hidden`` from memory, part by part."""
    d = tl.arange(0, BLOCK)
    if BLOCK == PART:
        return tl.dot(hidden, tl.trans(_matrix(recurrent, gate, head, heads, d, d, DIM)), sum, input_precision="ieee")
    for start in range(0, DIM, PART):
        into = start + tl.arange(0, PART)
        part = tl.load(y + rows[:, None] * DIM + into, mask=exists[:, None] & (into < DIM), other=0.0)
        R = _matrix(recurrent, gate, head, heads, d, into, DIM)
        sum = tl.dot(part, tl.trans(R), sum, input_precision="ieee")
    return sum


@triton.jit
def _recur_back(sum, draw, draws, rows, live, recurrent, gate: tl.constexpr, head, heads, DIM: tl.constexpr,
                BLOCK: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Return sum + draw @ R, likewise."""
    d = tl.arange(0, BLOCK)
    if BLOCK == PART:
        return tl.dot(draw, _matrix(recurrent, gate, head, heads, d, d, DIM), sum, input_precision="ieee")
    for start in range(0, DIM, PART):
        out = start + tl.arange(0, PART)
        at = (rows + gate * heads)[:, None] * DIM + out
        part = tl.load(draws + at, mask=live[:, None] & (out < DIM), other=0.0)
        sum = tl.dot(part, _matrix(recurrent, gate, head, heads, out, d, DIM), sum, input_precision="ieee")
    return sum


@triton.jit
def _sequences(order, firsts, lengths, sequences, heads, ROWS: tl.constexpr):
    """Return first token and length of a block of sequences, the rows of their states, and which of them exist."""
    head = tl.program_id(0) % heads
    rank = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    exists = rank < sequences
    sequence = tl.load(order + rank, mask=exists, other=0)
    first = tl.load(firsts + sequence, mask=exists, other=0)
    length = tl.load(lengths + sequence, mask=exists, other=0)
    return first, length, sequence * heads + head, exists


@triton.jit
def forward_kernel(gates, recurrent, order, firsts, lengths, y_first, c_first, n_first, m_first, y, c, n, m, y_last,
                   c_last, n_last, m_last, sequences, heads, DIM: tl.constexpr, BLOCK: tl.constexpr,
                   PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, HAS_FIRST: tl.constexpr,
                   SAVE: tl.constexpr):  # fmt: skip
    """Write y of every token, with ``SAVE`` also c, n and m, and the last state of every sequence."""
    first, length, rows, there = _sequences(order, firsts, lengths, sequences, heads, ROWS)
    head, d = tl.program_id(0) % heads, tl.arange(0, BLOCK)
    at_state, exists = rows[:, None] * DIM + d, there[:, None] & (d < DIM)
    hidden = tl.zeros((ROWS, BLOCK), tl.float32)
    cell, normaliser, stabiliser = hidden, hidden, hidden
    if HAS_FIRST:
        hidden = tl.load(y_first + at_state, mask=exists, other=0.0)
        cell = tl.load(c_first + at_state, mask=exists, other=0.0)
        normaliser = tl.load(n_first + at_state, mask=exists, other=0.0)
        stabiliser = tl.load(m_first + at_state, mask=exists, other=0.0)
    for t in range(0, tl.max(length, 0)):
        live = (t < length)[:, None] & (d < DIM)
        row = first + STEP * t
        at, of_gate = (row * 4 * heads + head)[:, None] * DIM + d, heads * DIM
        i_raw = tl.load(gates + at, mask=live, other=0.0)
        f_raw = tl.load(gates + at + of_gate, mask=live, other=0.0)
        z_raw = tl.load(gates + at + 2 * of_gate, mask=live, other=0.0)
        o_raw = tl.load(gates + at + 3 * of_gate, mask=live, other=0.0)
        if BLOCK > PART:
            tl.store(y_last + at_state, hidden, mask=exists)
            tl.debug_barrier()
        i_raw = _recur(i_raw, hidden, y_last, rows, there, recurrent, 0, head, heads, DIM, BLOCK, PART)
        f_raw = _recur(f_raw, hidden, y_last, rows, there, recurrent, 1, head, heads, DIM, BLOCK, PART)
        z_raw = _recur(z_raw, hidden, y_last, rows, there, recurrent, 2, head, heads, DIM, BLOCK, PART)
        o_raw = _recur(o_raw, hidden, y_last, rows, there, recurrent, 3, head, heads, DIM, BLOCK, PART)
        if BLOCK > PART:
            tl.debug_barrier()  # all is read before the next step writes it
        kept = _log_sigmoid(f_raw) + stabiliser
        highest = tl.where(normaliser == 0, i_raw, tl.maximum(i_raw, kept))
        write, keep = tl.exp(i_raw - highest), tl.exp(tl.minimum(kept - highest, 0.0))
        cell = tl.where(live, keep * cell + write * _tanh(z_raw), cell)
        normaliser = tl.where(live, keep * normaliser + write, normaliser)
        stabiliser = tl.where(live, highest, stabiliser)
        hidden = tl.where(live, tl.sigmoid(o_raw) * cell / normaliser, hidden)
        at = (row * heads + head)[:, None] * DIM + d
        tl.store(y + at, hidden, mask=live)
        if SAVE:
            tl.store(c + at, cell, mask=live)
            tl.store(n + at, normaliser, mask=live)
            tl.store(m + at, stabiliser, mask=live)
    tl.store(y_last + at_state, hidden, mask=exists)
    tl.store(c_last + at_state, cell, mask=exists)
    tl.store(n_last + at_state, normaliser, mask=exists)
    tl.store(m_last + at_state, stabiliser, mask=exists)


@triton.jit
def backward_kernel(raw, recurrent, order, firsts, lengths, c_first, n_first, m_first, c, n, m, dy, dy_last, dc_last,
                    dn_last, dm_last, draw, dy_first, dc_first, dn_first, dm_first, sequences, heads,
                    DIM: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                    HAS_FIRST: tl.constexpr):  # fmt: skip
    """Write the gradient of every pre-activation and of the initial states.

    c and n take m as a constant. ``dm_last`` is the gradient of the last m with c * exp(m) and n * exp(m) held; it
    flows back to what m was made of.
    """
    first, length, rows, there = _sequences(order, firsts, lengths, sequences, heads, ROWS)
    head, d = tl.program_id(0) % heads, tl.arange(0, BLOCK)
    at_state, exists = rows[:, None] * DIM + d, there[:, None] & (d < DIM)
    c_start = tl.zeros((ROWS, BLOCK), tl.float32)
    n_start, m_start = c_start, c_start
    if HAS_FIRST:
        c_start = tl.load(c_first + at_state, mask=exists, other=0.0)
        n_start = tl.load(n_first + at_state, mask=exists, other=0.0)
        m_start = tl.load(m_first + at_state, mask=exists, other=0.0)
    dhidden = tl.load(dy_last + at_state, mask=exists, other=0.0)
    dcell = tl.load(dc_last + at_state, mask=exists, other=0.0)
    dnormaliser = tl.load(dn_last + at_state, mask=exists, other=0.0)
    dstabiliser = tl.load(dm_last + at_state, mask=exists, other=0.0)
    longest = tl.max(length, 0)
    for back in range(0, longest):
        t = tl.zeros_like(length) + (longest - 1 - back)
        live = (t < length)[:, None] & (d < DIM)
        row = first + STEP * t
        at = (row * heads + head)[:, None] * DIM + d
        past, later = at - STEP * heads * DIM, live & (t > 0)[:, None]
        c_past = tl.where(later, tl.load(c + past, mask=later, other=0.0), c_start)
        n_past = tl.where(later, tl.load(n + past, mask=later, other=0.0), n_start)
        m_past = tl.where(later, tl.load(m + past, mask=later, other=0.0), m_start)
        cell = tl.load(c + at, mask=live, other=0.0)
        normaliser = tl.load(n + at, mask=live, other=1.0)
        stabiliser = tl.load(m + at, mask=live, other=0.0)
        at_raw, of_gate = (row * 4 * heads + head)[:, None] * DIM + d, heads * DIM
        i_raw = tl.load(raw + at_raw, mask=live, other=0.0)
        f_raw = tl.load(raw + at_raw + of_gate, mask=live, other=0.0)
        z = _tanh(tl.load(raw + at_raw + 2 * of_gate, mask=live, other=0.0))
        o = tl.sigmoid(tl.load(raw + at_raw + 3 * of_gate, mask=live, other=0.0))
        kept = _log_sigmoid(f_raw) + m_past
        write, keep = tl.exp(i_raw - stabiliser), tl.exp(tl.minimum(kept - stabiliser, 0.0))

        dhidden += tl.load(dy + at, mask=live, other=0.0)
        hidden = o * cell / normaliser
        dc = dcell + dhidden * o / normaliser
        dn = dnormaliser - dhidden * hidden / normaliser
        from_input = (n_past == 0) | (i_raw >= kept)
        di = write * (z * dc + dn) + tl.where(from_input, dstabiliser, 0.0)
        df = (keep * (c_past * dc + n_past * dn) + tl.where(from_input, 0.0, dstabiliser)) * tl.sigmoid(-f_raw)
        dz = write * dc * (1.0 - z * z)
        do = dhidden * hidden * (1.0 - o)
        tl.store(draw + at_raw, di, mask=live)
        tl.store(draw + at_raw + of_gate, df, mask=live)
        tl.store(draw + at_raw + 2 * of_gate, dz, mask=live)
        tl.store(draw + at_raw + 3 * of_gate, do, mask=live)
        if BLOCK > PART:
            tl.debug_barrier()
        before, at_gate, now = tl.zeros((ROWS, BLOCK), tl.float32), row * 4 * heads + head, t < length
        before = _recur_back(before, di, draw, at_gate, now, recurrent, 0, head, heads, DIM, BLOCK, PART)
        before = _recur_back(before, df, draw, at_gate, now, recurrent, 1, head, heads, DIM, BLOCK, PART)
        before = _recur_back(before, dz, draw, at_gate, now, recurrent, 2, head, heads, DIM, BLOCK, PART)
        before = _recur_back(before, do, draw, at_gate, now, recurrent, 3, head, heads, DIM, BLOCK, PART)
        dhidden = tl.where(live, before, dhidden)
        dcell = tl.where(live, keep * dc, dcell)
        dnormaliser = tl.where(live, keep * dn, dnormaliser)
        dstabiliser = tl.where(live & from_input, 0.0, dstabiliser)
    if HAS_FIRST:
        tl.store(dy_first + at_state, dhidden, mask=exists)
        tl.store(dc_first + at_state, dcell, mask=exists)
        tl.store(dn_first + at_state, dnormaliser, mask=exists)
        tl.store(dm_first + at_state, dstabiliser + c_start * dcell + n_start * dnormaliser, mask=exists)
