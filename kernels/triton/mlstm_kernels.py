# mypy: ignore-errors
# ruff: noqa: PLR0917 - a launch passes by position
"""The mLSTM's device code; ``mlstm.py`` launches it, ``kernels/mlstm_chunkwise.py`` has the formulas.

One row of the table ``chunks`` is (first token, length, position of that token in its sequence, sequence), so that no
chunk reaches across a boundary. States stand in slots: slot ``chunk + sequence`` holds the state before a chunk and the
next one that after it, since each sequence has one slot more than chunks. q, k and v are [tokens, heads, dim]; numbers
per token are [heads, tokens], so that a chunk of them is contiguous.

A program covers a block of queries i or keys j, and a block of dimensions. Where heads are wider than a block, their
products run over the rest in a loop, and only the first block is loaded once.

b, u = log i - b, and ``peak``, the running maximum of u, are float64. Their differences become float32 relative to the
first query of a block: what matters there is small, however long the chunk.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
INF = tl.constexpr(float("inf"))


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr):
    """Return sum + a @ b in float32."""
    if INTERPRETED:  # where a product of bfloat16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _low(x, high):
    """What float32 lost of x; nothing of an infinity."""
    return tl.where(tl.abs(x) < INF, x - high, 0.0).to(tl.float32)


@triton.jit
def _decay(write, decay, seen, EXACT: tl.constexpr):
    """Return exp(write - decay) where seen, else 0; ``EXACT`` goes beyond float32 in what the exponent is made of."""
    write_high, decay_high = write.to(tl.float32), decay.to(tl.float32)
    exponent = write_high - decay_high
    if EXACT:
        exponent += _low(write, write_high) - _low(decay, decay_high)
    return tl.exp(tl.where(seen, exponent, -INF))


@triton.jit
def _chunk(chunks, chunk):
    """Return the first token of a chunk, its length, and the slot of the state before it."""
    row = chunks + chunk * 4
    return tl.load(row), tl.load(row + 1), chunk + tl.load(row + 3)


@triton.jit
def _place(row, live, head, heads, start, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the offsets of a block [rows, BLOCK] in a tensor [rows, heads, DIM], and which of it exists."""
    d = start + tl.arange(0, BLOCK)
    return (row * heads + head)[:, None] * DIM + d, live[:, None] & (d < DIM)


@triton.jit
def _tile(x, row, live, head, heads, start, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = _place(row, live, head, heads, start, DIM, BLOCK)
    return tl.load(x + at, mask=exists, other=0.0)


@triton.jit
def _state(slot, head, heads, k0, v0, QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Return the offsets of a block of C, and which of it exists."""
    k, v = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
    return ((slot.to(tl.int64) * heads + head) * QK + k)[:, None] * V + v, (k < QK)[:, None] & (v < V)


@triton.jit
def _vector(slot, head, heads, k0, QK: tl.constexpr, BK: tl.constexpr):
    """The same for n."""
    k = k0 + tl.arange(0, BK)
    return (slot.to(tl.int64) * heads + head) * QK + k, k < QK


@triton.jit
def _product(a, a0, a_row, a_live, b, b_row, b_live, sum, head, heads, DIM: tl.constexpr, BLOCK: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Return sum + A @ B^T over all dimensions of two blocks of rows; ``a0`` is the first block of A."""
    sum = _dot(a0, tl.trans(_tile(b, b_row, b_live, head, heads, 0, DIM, BLOCK)), sum, PRECISION)
    for d in range(BLOCK, DIM, BLOCK):
        left = _tile(a, a_row, a_live, head, heads, d, DIM, BLOCK)
        sum = _dot(left, tl.trans(_tile(b, b_row, b_live, head, heads, d, DIM, BLOCK)), sum, PRECISION)
    return sum


@triton.jit
def gates_kernel(log_input, log_forget, chunks, b, u, peak, top, tokens, heads, STEP: tl.constexpr,
                 LENGTH: tl.constexpr):  # fmt: skip
    """b, u and its running maximum for one chunk and head, and the place of the maximum."""
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, length, _ = _chunk(chunks, chunk)
    p = tl.arange(0, LENGTH)
    live = p < length
    token = first + STEP * p
    log_f = tl.load(log_forget + token * heads + head, mask=live, other=0.0).to(tl.float64)
    log_i = tl.load(log_input + token * heads + head, mask=live, other=-INF).to(tl.float64)
    decay = tl.cumsum(log_f, 0)
    write = log_i - decay
    at = head.to(tl.int64) * tokens + token
    tl.store(b + at, decay, mask=live)
    tl.store(u + at, write, mask=live)
    tl.store(peak + at, tl.associative_scan(write, 0, _maximum), mask=live)
    tl.store(top + tl.program_id(0), tl.max(tl.where(write == tl.max(write, 0), p, 0), 0))


@triton.jit
def carry_kernel(k, v, b, u, peak, top, chunks, edges, C_first, n_first, m_first, C, n, m, C_last, source, tokens,
                 heads, QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BJ: tl.constexpr,
                 STEP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Fill the slots of one sequence and head for a block of C, chunk after chunk.

    ``source`` is the position of the token whose input gate became the last m, or -1 where the initial m did.
    """
    blocks_v = tl.cdiv(V, BV)
    blocks = tl.cdiv(QK, BK) * blocks_v
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    k0, v0 = block // blocks_v * BK, block % blocks_v * BV
    head, sequence = pair % heads, pair // heads
    memory = tl.zeros((BK, BV), tl.float32)
    normaliser = tl.zeros((BK,), tl.float32)
    stabiliser = tl.full((), 0.0, tl.float32)
    if HAS_FIRST:
        at, exists = _state(sequence, head, heads, k0, v0, QK, V, BK, BV)
        memory = tl.load(C_first + at, mask=exists, other=0.0)
        along, there = _vector(sequence, head, heads, k0, QK, BK)
        normaliser = tl.load(n_first + along, mask=there, other=0.0)
        stabiliser = tl.load(m_first + pair)
    origin = tl.full((), -1, tl.int64)
    first_chunk, end_chunk = tl.load(edges + sequence), tl.load(edges + sequence + 1)
    gates = head.to(tl.int64) * tokens
    for chunk in range(first_chunk, end_chunk + 1):
        slot = chunk + sequence
        at, exists = _state(slot, head, heads, k0, v0, QK, V, BK, BV)
        tl.store(C + at, memory.to(C.dtype.element_ty), mask=exists)
        if v0 == 0:
            along, there = _vector(slot, head, heads, k0, QK, BK)
            tl.store(n + along, normaliser, mask=there)
        if block == 0:
            tl.store(m + slot * heads + head, stabiliser)
        if chunk < end_chunk:
            first, length, _ = _chunk(chunks, chunk)
            last = gates + first + STEP * (length - 1)
            total, highest, before = tl.load(b + last), tl.load(peak + last), stabiliser.to(tl.float64)
            position = tl.load(chunks + chunk * 4 + 2) + tl.load(top + chunk * heads + head)
            origin = tl.where(highest > before, position, origin)
            stabiliser = (total + tl.maximum(before, highest)).to(tl.float32)  # rounded: C * exp(m) is to be exact
            leave = total - stabiliser.to(tl.float64)
            keep = tl.exp((leave + before).to(tl.float32))
            memory *= keep
            normaliser *= keep
            for j0 in range(0, length, BJ):
                j = j0 + tl.arange(0, BJ)
                live = j < length
                row = first + STEP * j
                write = tl.exp((leave + tl.load(u + gates + row, mask=live, other=-INF)).to(tl.float32))
                written = _tile(k, row, live, head, heads, k0, QK, BK).to(tl.float32) * write[:, None]
                normaliser += tl.sum(written, 0)
                values = _tile(v, row, live, head, heads, v0, V, BV)
                memory = _dot(tl.trans(written.to(values.dtype)), values, memory, PRECISION)
    if HAS_LAST:
        at, exists = _state(sequence, head, heads, k0, v0, QK, V, BK, BV)
        tl.store(C_last + at, memory, mask=exists)
    if block == 0:
        tl.store(source + pair, origin)


@triton.jit
def output_kernel(q, k, v, b, u, peak, chunks, C, n, m, h, inverse, slope, tokens, heads, half_log_qk,
                  QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr,
                  BJ: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, CARRIES: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Write h of a block of queries and values, 1 / N, and the slope of N: 1, -1, or 0 where the floor holds."""
    blocks_v = tl.cdiv(V, BV)
    v0, i0 = tl.program_id(0) % blocks_v * BV, tl.program_id(0) // blocks_v % BLOCKS * BI
    pair = tl.program_id(0) // (blocks_v * BLOCKS)
    chunk, head = pair // heads, pair % heads
    first, length, slot = _chunk(chunks, chunk)
    if i0 >= length:
        return
    gates = head.to(tl.int64) * tokens
    before = tl.load(m + slot * heads + head).to(tl.float64)
    i = i0 + tl.arange(0, BI)
    i_live, i_row = i < length, first + STEP * i
    reach = tl.maximum(tl.load(peak + gates + i_row, mask=i_live, other=INF), before)
    base = tl.min(reach, 0)
    i_decay = reach - base + half_log_qk
    Q = _tile(q, i_row, i_live, head, heads, 0, QK, BK)
    numerator = tl.zeros((BI, BV), tl.float32)
    denominator = tl.zeros((BI,), tl.float32)
    if CARRIES:
        for k0 in range(0, QK, BK):
            left = _tile(q, i_row, i_live, head, heads, k0, QK, BK)
            at, exists = _state(slot, head, heads, k0, v0, QK, V, BK, BV)
            numerator = _dot(left, tl.load(C + at, mask=exists, other=0.0), numerator, PRECISION)
            along, there = _vector(slot, head, heads, k0, QK, BK)
            denominator += tl.sum(left.to(tl.float32) * tl.load(n + along, mask=there, other=0.0), 1)
        start = tl.exp((before - reach - half_log_qk).to(tl.float32))
        numerator *= start[:, None]
        denominator *= start
    for j0 in range(0, tl.minimum(i0 + BI, length), BJ):
        j = j0 + tl.arange(0, BJ)
        j_live, j_row = j < length, first + STEP * j
        j_write = tl.load(u + gates + j_row, mask=j_live, other=-INF) - base
        P = _product(q, Q, i_row, i_live, k, j_row, j_live, tl.zeros((BI, BJ), tl.float32), head, heads, QK, BK,
                     PRECISION)  # fmt: skip
        P *= _decay(j_write, i_decay[:, None], i[:, None] >= j, q.dtype.element_ty == tl.float32)
        denominator += tl.sum(P, 1)
        values = _tile(v, j_row, j_live, head, heads, v0, V, BV)
        numerator = _dot(P.to(values.dtype), values, numerator, PRECISION)
    floor = tl.exp((-tl.load(b + gates + i_row, mask=i_live, other=0.0) - reach).to(tl.float32))
    size = tl.abs(denominator)
    one_over = 1.0 / tl.where(i_live, tl.maximum(size, floor), 1.0)
    at, exists = _place(i_row, i_live, head, heads, v0, V, BV)
    tl.store(h + at, (numerator * one_over[:, None]).to(h.dtype.element_ty), mask=exists)
    if v0 == 0:
        sign = tl.where(denominator < 0, -1.0, 1.0)
        tl.store(inverse + gates + i_row, one_over, mask=i_live)
        tl.store(slope + gates + i_row, tl.where(size > floor, sign, 0.0), mask=i_live)


@triton.jit
def denominator_kernel(h, dh, inverse, slope, dden, rows, tokens, heads, V: tl.constexpr, BV: tl.constexpr,
                       ROWS: tl.constexpr):  # fmt: skip
    """The gradient of each denominator; rows are tokens * heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    dot = tl.zeros((ROWS,), tl.float32)
    for v0 in range(0, V, BV):
        at, exists = _place(row, live, 0, 1, v0, V, BV)
        gradient = tl.load(dh + at, mask=exists, other=0.0).to(tl.float32)
        dot += tl.sum(tl.load(h + at, mask=exists, other=0.0).to(tl.float32) * gradient, 1)
    at = row % heads * tokens + row // heads
    factor = tl.load(inverse + at, mask=live, other=0.0) * tl.load(slope + at, mask=live, other=0.0)
    tl.store(dden + at, -dot * factor, mask=live)


@triton.jit
def carry_back_kernel(q, dh, b, peak, inverse, dden, chunks, edges, C, n, m, dC_last, dn_last, dC, dn, dC_first,
                      dn_first, flow, tokens, heads, half_log_qk, QK: tl.constexpr, V: tl.constexpr,
                      BK: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr, STEP: tl.constexpr,
                      CARRIES: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """Fill the slots with the gradients of the states, last chunk first.

    ``flow`` [chunks, heads, blocks] is <C, dC> + <n, dn> after each chunk: what its forget gates, all of them, moved.
    """
    blocks_v = tl.cdiv(V, BV)
    blocks = tl.cdiv(QK, BK) * blocks_v
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    k0, v0 = block // blocks_v * BK, block % blocks_v * BV
    head, sequence = pair % heads, pair // heads
    memory = tl.zeros((BK, BV), tl.float32)
    normaliser = tl.zeros((BK,), tl.float32)
    if HAS_LAST:
        at, exists = _state(sequence, head, heads, k0, v0, QK, V, BK, BV)
        memory = tl.load(dC_last + at, mask=exists, other=0.0)
        along, there = _vector(sequence, head, heads, k0, QK, BK)
        normaliser = tl.load(dn_last + along, mask=there, other=0.0)
    first_chunk, end_chunk = tl.load(edges + sequence), tl.load(edges + sequence + 1)
    gates = head.to(tl.int64) * tokens
    for back in range(0, end_chunk - first_chunk):
        chunk = end_chunk - 1 - back
        slot = chunk + sequence
        at, exists = _state(slot + 1, head, heads, k0, v0, QK, V, BK, BV)
        tl.store(dC + at, memory.to(dC.dtype.element_ty), mask=exists)
        moved = tl.sum(tl.load(C + at, mask=exists, other=0.0).to(tl.float32) * memory)
        if v0 == 0:
            along, there = _vector(slot + 1, head, heads, k0, QK, BK)
            tl.store(dn + along, normaliser, mask=there)
            moved += tl.sum(tl.load(n + along, mask=there, other=0.0) * normaliser)
        tl.store(flow + (chunk * heads + head) * blocks + block, moved)
        if CARRIES:
            first, length, _ = _chunk(chunks, chunk)
            before = tl.load(m + slot * heads + head).to(tl.float64)
            after = tl.load(m + (slot + 1) * heads + head).to(tl.float64)
            total = tl.load(b + gates + first + STEP * (length - 1))
            keep = tl.exp((total + before - after).to(tl.float32))
            memory *= keep
            normaliser *= keep
            for i0 in range(0, length, BI):
                i = i0 + tl.arange(0, BI)
                live = i < length
                row = first + STEP * i
                reach = tl.maximum(tl.load(peak + gates + row, mask=live, other=INF), before)
                start = tl.exp((before - reach - half_log_qk).to(tl.float32))
                asked = _tile(q, row, live, head, heads, k0, QK, BK).to(tl.float32) * start[:, None]
                normaliser += tl.sum(asked * tl.load(dden + gates + row, mask=live, other=0.0)[:, None], 0)
                asked *= tl.load(inverse + gates + row, mask=live, other=0.0)[:, None]
                dH = _tile(dh, row, live, head, heads, v0, V, BV)
                memory = _dot(tl.trans(asked.to(dH.dtype)), dH, memory, PRECISION)
    if HAS_FIRST:
        at, exists = _state(sequence, head, heads, k0, v0, QK, V, BK, BV)
        tl.store(dC_first + at, memory, mask=exists)
        if v0 == 0:
            along, there = _vector(sequence, head, heads, k0, QK, BK)
            tl.store(dn_first + along, normaliser, mask=there)


@triton.jit
def query_gradient_kernel(q, k, v, dh, u, peak, inverse, dden, chunks, C, n, m, dq, drow, tokens, heads, half_log_qk,
                          QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr,
                          BJ: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, CARRIES: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """Write dq of a block of queries and dimensions, and that block's share of q . dq."""
    blocks_k = tl.cdiv(QK, BK)
    block, i0 = tl.program_id(0) % blocks_k, tl.program_id(0) // blocks_k % BLOCKS * BI
    pair = tl.program_id(0) // (blocks_k * BLOCKS)
    chunk, head = pair // heads, pair % heads
    first, length, slot = _chunk(chunks, chunk)
    if i0 >= length:
        return
    k0 = block * BK
    gates = head.to(tl.int64) * tokens
    before = tl.load(m + slot * heads + head).to(tl.float64)
    i = i0 + tl.arange(0, BI)
    i_live, i_row = i < length, first + STEP * i
    reach = tl.maximum(tl.load(peak + gates + i_row, mask=i_live, other=INF), before)
    base = tl.min(reach, 0)
    i_decay = reach - base + half_log_qk
    i_inverse = tl.load(inverse + gates + i_row, mask=i_live, other=0.0)
    i_dden = tl.load(dden + gates + i_row, mask=i_live, other=0.0)
    dH = _tile(dh, i_row, i_live, head, heads, 0, V, BV)
    dQ = tl.zeros((BI, BK), tl.float32)
    if CARRIES:
        for v0 in range(0, V, BV):
            left = _tile(dh, i_row, i_live, head, heads, v0, V, BV)
            at, exists = _state(slot, head, heads, k0, v0, QK, V, BK, BV)
            dQ = _dot(left, tl.trans(tl.load(C + at, mask=exists, other=0.0)), dQ, PRECISION)
        along, there = _vector(slot, head, heads, k0, QK, BK)
        dQ = dQ * i_inverse[:, None] + i_dden[:, None] * tl.load(n + along, mask=there, other=0.0)
        dQ *= tl.exp((before - reach - half_log_qk).to(tl.float32))[:, None]
    for j0 in range(0, tl.minimum(i0 + BI, length), BJ):
        j = j0 + tl.arange(0, BJ)
        j_live, j_row = j < length, first + STEP * j
        j_write = tl.load(u + gates + j_row, mask=j_live, other=-INF) - base
        dS = _product(dh, dH, i_row, i_live, v, j_row, j_live, tl.zeros((BI, BJ), tl.float32), head, heads, V, BV,
                      PRECISION)  # fmt: skip
        dS = dS * i_inverse[:, None] + i_dden[:, None]
        dS *= _decay(j_write, i_decay[:, None], i[:, None] >= j, q.dtype.element_ty == tl.float32)
        keys = _tile(k, j_row, j_live, head, heads, k0, QK, BK)
        dQ = _dot(dS.to(keys.dtype), keys, dQ, PRECISION)
    at, exists = _place(i_row, i_live, head, heads, k0, QK, BK)
    tl.store(dq + at, dQ.to(dq.dtype.element_ty), mask=exists)
    share = tl.sum(tl.load(q + at, mask=exists, other=0.0).to(tl.float32) * dQ, 1)
    tl.store(drow + (block.to(tl.int64) * heads + head) * tokens + i_row, share, mask=i_live)


@triton.jit
def key_gradient_kernel(q, k, v, dh, b, u, peak, inverse, dden, chunks, m, dC, dn, dk, du, tokens, heads, half_log_qk,
                        QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr,
                        BJ: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, FLOWS: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """Write dk of a block of keys and dimensions, and that block's share of k . dk."""
    blocks_k = tl.cdiv(QK, BK)
    block, j0 = tl.program_id(0) % blocks_k, tl.program_id(0) // blocks_k % BLOCKS * BJ
    pair = tl.program_id(0) // (blocks_k * BLOCKS)
    chunk, head = pair // heads, pair % heads
    first, length, slot = _chunk(chunks, chunk)
    if j0 >= length:
        return
    k0 = block * BK
    gates = head.to(tl.int64) * tokens
    before = tl.load(m + slot * heads + head).to(tl.float64)
    j = j0 + tl.arange(0, BJ)
    j_live, j_row = j < length, first + STEP * j
    write = tl.load(u + gates + j_row, mask=j_live, other=-INF)
    values = _tile(v, j_row, j_live, head, heads, 0, V, BV)
    dK = tl.zeros((BJ, BK), tl.float32)
    if FLOWS:
        for v0 in range(0, V, BV):
            left = _tile(v, j_row, j_live, head, heads, v0, V, BV)
            at, exists = _state(slot + 1, head, heads, k0, v0, QK, V, BK, BV)
            dK = _dot(left, tl.trans(tl.load(dC + at, mask=exists, other=0.0)), dK, PRECISION)
        along, there = _vector(slot + 1, head, heads, k0, QK, BK)
        dK += tl.load(dn + along, mask=there, other=0.0)
        leave = tl.load(b + gates + first + STEP * (length - 1)) - tl.load(m + (slot + 1) * heads + head)
        dK *= tl.exp((leave + write).to(tl.float32))[:, None]
    for i0 in range(j0 // BI * BI, length, BI):
        i = i0 + tl.arange(0, BI)
        i_live, i_row = i < length, first + STEP * i
        reach = tl.maximum(tl.load(peak + gates + i_row, mask=i_live, other=INF), before)
        base = tl.min(reach, 0)
        i_decay, j_write = reach - base + half_log_qk, write - base
        dS = _product(v, values, j_row, j_live, dh, i_row, i_live, tl.zeros((BJ, BI), tl.float32), head, heads, V, BV,
                      PRECISION)  # fmt: skip
        dS *= tl.load(inverse + gates + i_row, mask=i_live, other=0.0)
        dS += tl.load(dden + gates + i_row, mask=i_live, other=0.0)
        dS *= _decay(j_write[:, None], i_decay, i >= j[:, None], q.dtype.element_ty == tl.float32)
        queries = _tile(q, i_row, i_live, head, heads, k0, QK, BK)
        dK = _dot(dS.to(queries.dtype), queries, dK, PRECISION)
    at, exists = _place(j_row, j_live, head, heads, k0, QK, BK)
    tl.store(dk + at, dK.to(dk.dtype.element_ty), mask=exists)
    share = tl.sum(tl.load(k + at, mask=exists, other=0.0).to(tl.float32) * dK, 1)
    tl.store(du + (block.to(tl.int64) * heads + head) * tokens + j_row, share, mask=j_live)


@triton.jit
def value_gradient_kernel(q, k, dh, b, u, peak, inverse, chunks, m, dC, dv, tokens, heads, half_log_qk,
                          QK: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr,
                          BJ: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, FLOWS: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """Write dv of a block of keys and dimensions."""
    blocks_v = tl.cdiv(V, BV)
    v0, j0 = tl.program_id(0) % blocks_v * BV, tl.program_id(0) // blocks_v % BLOCKS * BJ
    pair = tl.program_id(0) // (blocks_v * BLOCKS)
    chunk, head = pair // heads, pair % heads
    first, length, slot = _chunk(chunks, chunk)
    if j0 >= length:
        return
    gates = head.to(tl.int64) * tokens
    before = tl.load(m + slot * heads + head).to(tl.float64)
    j = j0 + tl.arange(0, BJ)
    j_live, j_row = j < length, first + STEP * j
    write = tl.load(u + gates + j_row, mask=j_live, other=-INF)
    keys = _tile(k, j_row, j_live, head, heads, 0, QK, BK)
    dV = tl.zeros((BJ, BV), tl.float32)
    if FLOWS:
        for k0 in range(0, QK, BK):
            left = _tile(k, j_row, j_live, head, heads, k0, QK, BK)
            at, exists = _state(slot + 1, head, heads, k0, v0, QK, V, BK, BV)
            dV = _dot(left, tl.load(dC + at, mask=exists, other=0.0), dV, PRECISION)
        leave = tl.load(b + gates + first + STEP * (length - 1)) - tl.load(m + (slot + 1) * heads + head)
        dV *= tl.exp((leave + write).to(tl.float32))[:, None]
    for i0 in range(j0 // BI * BI, length, BI):
        i = i0 + tl.arange(0, BI)
        i_live, i_row = i < length, first + STEP * i
        reach = tl.maximum(tl.load(peak + gates + i_row, mask=i_live, other=INF), before)
        base = tl.min(reach, 0)
        i_decay, j_write = reach - base + half_log_qk, write - base
        P = _product(k, keys, j_row, j_live, q, i_row, i_live, tl.zeros((BJ, BI), tl.float32), head, heads, QK, BK,
                     PRECISION)  # fmt: skip
        P *= tl.load(inverse + gates + i_row, mask=i_live, other=0.0)
        P *= _decay(j_write[:, None], i_decay, i >= j[:, None], q.dtype.element_ty == tl.float32)
        dH = _tile(dh, i_row, i_live, head, heads, v0, V, BV)
        dV = _dot(P.to(dH.dtype), dH, dV, PRECISION)
    at, exists = _place(j_row, j_live, head, heads, v0, V, BV)
    tl.store(dv + at, dV.to(dv.dtype.element_ty), mask=exists)


@triton.jit
def gates_gradient_kernel(drow, du, flow, dm, source, chunks, dlog_input, dlog_forget, tokens, heads, shares, blocks,
                          STEP: tl.constexpr, LENGTH: tl.constexpr, FLOWS: tl.constexpr, HAS_FIRST: tl.constexpr,
                          HAS_LAST: tl.constexpr):  # fmt: skip
    """Sum the shares of one chunk and head up to the gradients of its log gates.

    ``dm`` is the gradient of each sequence's last m: it goes to the input gate at ``source`` and to what came after.
    """
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, length, _ = _chunk(chunks, chunk)
    p = tl.arange(0, LENGTH)
    live = p < length
    token = first + STEP * p
    to_write = tl.zeros((LENGTH,), tl.float32)
    to_decay = tl.zeros((LENGTH,), tl.float32)
    for share in range(0, shares):
        at = (share * heads + head.to(tl.int64)) * tokens + token
        to_write += tl.load(du + at, mask=live, other=0.0)
        to_decay += tl.load(drow + at, mask=live, other=0.0)
    forget = tl.cumsum(to_decay - to_write, 0, reverse=True)
    if FLOWS:
        moved = tl.full((), 0.0, tl.float32)
        for block in range(0, blocks):
            moved += tl.load(flow + (chunk.to(tl.int64) * heads + head) * blocks + block)
        forget += moved
    row = chunks + chunk.to(tl.int64) * 4
    position = tl.load(row + 2) + p
    if not HAS_FIRST:
        forget = tl.where(position == 0, 0.0, forget)  # there was nothing to forget; the sum says so up to rounding
    if HAS_LAST:
        pair = tl.load(row + 3) * heads + head
        origin, dm_last = tl.load(source + pair), tl.load(dm + pair)
        forget += tl.where(position > origin, dm_last, 0.0)
        to_write += tl.where(position == origin, dm_last, 0.0)
    tl.store(dlog_input + token * heads + head, to_write, mask=live)
    tl.store(dlog_forget + token * heads + head, forget, mask=live)


@triton.jit
def step_kernel(q, k, v, log_input, log_forget, C, n, m, h, C_next, n_next, m_next, heads, scale, QK: tl.constexpr,
                V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """One token for one sequence and head: a block of values, all of the keys, C read and written once."""
    blocks_v = tl.cdiv(V, BV)
    v0, pair = tl.program_id(0) % blocks_v * BV, (tl.program_id(0) // blocks_v).to(tl.int64)
    d, e = tl.arange(0, BK), v0 + tl.arange(0, BV)
    kept = tl.load(log_forget + pair) + tl.load(m + pair)
    log_i = tl.load(log_input + pair)
    stabiliser = tl.maximum(kept, log_i)
    decay, write = tl.exp(kept - stabiliser), tl.exp(log_i - stabiliser)
    query = tl.load(q + pair * QK + d, mask=d < QK, other=0.0).to(tl.float32) * scale
    written = tl.load(k + pair * QK + d, mask=d < QK, other=0.0).to(tl.float32) * write
    values = tl.load(v + pair * V + e, mask=e < V, other=0.0).to(tl.float32)
    at, exists = (pair * QK + d)[:, None] * V + e, (d < QK)[:, None] & (e < V)
    memory = tl.load(C + at, mask=exists, other=0.0) * decay + written[:, None] * values
    tl.store(C_next + at, memory, mask=exists)
    normaliser = tl.load(n + pair * QK + d, mask=d < QK, other=0.0) * decay + written
    size = tl.maximum(tl.abs(tl.sum(normaliser * query, 0)), tl.exp(-stabiliser))
    out = tl.sum(query[:, None] * memory, 0) / size
    tl.store(h + pair * V + e, out.to(h.dtype.element_ty), mask=e < V)
    if v0 == 0:
        tl.store(n_next + pair * QK + d, normaliser, mask=d < QK)
        tl.store(m_next + pair, stabiliser)
