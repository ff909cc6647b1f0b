// Runs a graph that tools/export.py made from a snippet. Shapes and dtypes are fixed when
// the graph is exported, so each op is told what it returns and only has to fill it.
// A tensor is {shape, dtype, data}: contiguous, integers as doubles, bool as 0 and 1.

const ARRAYS = { float32: Float32Array, float64: Float64Array, int64: Float64Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array };

const count = (shape) => shape.reduce((a, b) => a * b, 1);
const wrap = (dim, rank) => (dim < 0 ? dim + rank : dim);
const made = (node, data) => ({ shape: node.shape, dtype: node.dtype, data });
const empty = (node) => new ARRAYS[node.dtype](count(node.shape));

function strides(shape) {
  const found = new Array(shape.length);
  for (let d = shape.length - 1, step = 1; d >= 0; step *= shape[d--]) found[d] = step;
  return found;
}

// The offsets of a strided view, in the order of its elements.
function offsets(shape, steps, start = 0) {
  let found = [start];
  shape.forEach((size, d) => {
    const next = new Array(found.length * size);
    let n = 0;
    for (const offset of found) for (let k = 0; k < size; k++) next[n++] = offset + k * steps[d];
    found = next;
  });
  return found;
}

function view(node, x, steps, start) {
  const out = empty(node), from = offsets(node.shape, steps, start);
  for (let i = 0; i < out.length; i++) out[i] = x.data[from[i]];
  return made(node, out);
}

// Data broadcast to a shape; a number stands for a tensor full of it.
function spread(x, shape) {
  const size = count(shape);
  if (!x?.data) return new Float64Array(size).fill(Number(x));
  if (x.data.length === size) return x.data;
  const extra = shape.length - x.shape.length, own = strides(x.shape);
  const steps = shape.map((_, d) => (d < extra || x.shape[d - extra] === 1 ? 0 : own[d - extra]));
  return offsets(shape, steps).map((offset) => x.data[offset]);
}

// An op on each element; `over` says which arguments take part.
const each = (fn, over = fn.length) => (node, ...args) => {
  const [a, b, c] = args.slice(0, over).map((x) => spread(x, node.shape));
  const out = empty(node), size = out.length;
  if (c) for (let i = 0; i < size; i++) out[i] = fn(a[i], b[i], c[i]);
  else if (b) for (let i = 0; i < size; i++) out[i] = fn(a[i], b[i]);
  else for (let i = 0; i < size; i++) out[i] = fn(a[i]);
  return made(node, out);
};

// For each element that remains when `dims` go: the offsets of those it is made from.
function groups(x, dims) {
  const rank = x.shape.length, own = strides(x.shape);
  const given = [dims ?? []].flat(), all = x.shape.map((_, d) => d);
  const gone = given.length ? given.map((d) => wrap(d, rank)) : all;
  const kept = all.filter((d) => !gone.includes(d));
  gone.sort((a, b) => a - b);
  const pick = (dims, start) => offsets(dims.map((d) => x.shape[d]), dims.map((d) => own[d]), start);
  return pick(kept, 0).map((start) => pick(gone, start));
}

function fill(node, values) {
  const out = empty(node);
  values.forEach((value, i) => (out[i] = value));
  return made(node, out);
}

const reduce = (fn) => (node, x, dims) =>
  fill(node, groups(x, dims).map((group) => fn(group.map((offset) => x.data[offset]))));

const total = (values) => values.reduce((a, b) => a + b, 0);
const highest = (values) => values.reduce((a, b) => (b > a || b !== b ? b : a), -Infinity);
const lowest = (values) => values.reduce((a, b) => (b < a || b !== b ? b : a), Infinity);

function variance(values, correction) {
  const mean = total(values) / values.length;
  return total(values.map((v) => (v - mean) ** 2)) / Math.max(values.length - correction, 0);
}

// Along one dimension, line by line: fn gets the values and returns as many.
const along = (fn) => (node, x, dim, ...rest) => {
  const out = empty(node);
  for (const group of groups(x, [dim])) {
    fn(group.map((offset) => x.data[offset]), ...rest).forEach((v, k) => (out[group[k]] = v));
  }
  return made(node, out);
};

// Order of a line's positions by value, NaN above all; ties keep their order.
function order(values, descending) {
  const above = (a, b) => (a !== a ? (b !== b ? 0 : 1) : b !== b ? -1 : a - b);
  const sign = descending ? -1 : 1;
  return values.map((_, k) => k).sort((i, j) => sign * above(values[i], values[j]) || i - j);
}

function select(node, x, dim, limit, descending) {
  const [values, indices] = node.outputs.map(empty);
  const d = wrap(dim, x.shape.length);
  const lines = groups(x, [d]), targets = groups({ shape: node.outputs[0].shape }, [d]);
  lines.forEach((line, n) => {
    const line_values = line.map((offset) => x.data[offset]);
    order(line_values, descending).slice(0, limit).forEach((k, rank) => {
      values[targets[n][rank]] = line_values[k];
      indices[targets[n][rank]] = k;
    });
  });
  return [made(node.outputs[0], values), made(node.outputs[1], indices)];
}

// (..., n, k) times (..., k, m), summed in double precision.
function multiply(node, a, b, scale = 1, add = null) {
  const [n, k] = a.shape.slice(-2), m = b.shape.at(-1);
  const out = empty(node);
  for (let i = 0; i < out.length; i++) {
    const column = i % m, row = Math.floor(i / m), batch = n ? Math.floor(row / n) : 0;
    let sum = 0;
    for (let j = 0; j < k; j++) sum += a.data[row * k + j] * b.data[(batch * k + j) * m + column];
    out[i] = scale * sum + (add ? add[i] : 0);
  }
  return made(node, out);
}

function convolve(node, x, weight, bias, stride, padding, dilation) {
  const [, channels, height, width] = x.shape, [, , kh, kw] = weight.shape;
  const [, outputs, h, w] = node.shape, out = empty(node);
  for (let i = 0; i < out.length; i++) {
    const column = i % w, row = Math.floor(i / w) % h;
    const o = Math.floor(i / (h * w)) % outputs, image = Math.floor(i / (h * w * outputs));
    let sum = bias ? bias.data[o] : 0;
    for (let c = 0; c < channels; c++)
      for (let u = 0; u < kh; u++)
        for (let v = 0; v < kw; v++) {
          const y = row * stride[0] - padding[0] + u * dilation[0];
          const z = column * stride[1] - padding[1] + v * dilation[1];
          if (y < 0 || z < 0 || y >= height || z >= width) continue;
          sum += x.data[((image * channels + c) * height + y) * width + z]
            * weight.data[((o * channels + c) * kh + u) * kw + v];
        }
    out[i] = sum;
  }
  return made(node, out);
}

// Reads x along one dimension at the places that `index` has for each output element.
function take(node, x, dim, place) {
  const d = wrap(dim, x.shape.length), own = strides(x.shape), out = empty(node);
  const base = offsets(node.shape, own.map((step, n) => (n === d ? 0 : step)));
  const line = offsets(node.shape, own.map((_, n) => (n === d ? 1 : 0)));
  for (let i = 0; i < out.length; i++) out[i] = x.data[base[i] + place(i, line[i]) * own[d]];
  return made(node, out);
}

function indexed(node, x, indices) {
  const own = strides(x.shape);
  const first = indices.findIndex((index) => index), given = indices.filter((index) => index);
  const rank = Math.max(...given.map((t) => t.shape.length)); // the indices broadcast
  const sizes = (d) => given.map((t) => t.shape[d - rank + t.shape.length] ?? 1);
  const shape = Array.from({ length: rank }, (_, d) => sizes(d).find((n) => n !== 1) ?? 1);
  const flat = given.map((t) => spread(t, shape));
  const starts = Array.from({ length: count(shape) }, (_, i) => given.reduce((sum, _, g) =>
    sum + wrap(flat[g][i], x.shape[first + g]) * own[first + g], 0));
  const rest = (from, to) => offsets(x.shape.slice(from, to), own.slice(from, to));
  const after = rest(first + given.length), out = empty(node);
  let n = 0;
  for (const a of rest(0, first)) for (const b of starts) for (const c of after) out[n++] = x.data[a + b + c];
  return made(node, out);
}

function joined(node, tensors, dim) {
  const d = wrap(dim, node.shape.length), own = strides(node.shape), out = empty(node);
  let start = 0;
  for (const x of tensors) {
    if (x.shape.length !== node.shape.length) continue; // torch skips an empty (0,) as well
    offsets(x.shape, own, start * own[d]).forEach((offset, i) => (out[offset] = x.data[i]));
    start += x.shape[d];
  }
  return made(node, out);
}

const triangle = (keep) => (node, x, diagonal = 0) => {
  const [rows, columns] = x.shape.slice(-2), out = empty(node);
  for (let i = 0; i < out.length; i++) {
    const column = i % columns, row = Math.floor(i / columns) % rows;
    out[i] = keep(column - row, diagonal) ? x.data[i] : 0;
  }
  return made(node, out);
};

const CAST = { int64: Math.trunc, bool: (v) => v !== 0 };
const same = (node, x) => node.dtype === x.dtype ? made(node, x.data)
  : fill(node, Array.from(x.data, CAST[node.dtype]));

const parts = (node, x, sizes, dim = 0) => {
  let start = 0;
  const d = wrap(dim, x.shape.length), own = strides(x.shape);
  return node.outputs.map((part) => {
    const piece = view(part, x, own, start * own[d]);
    start += part.shape[d];
    return piece;
  });
};

function swapped(node, x, a, b) {
  const own = strides(x.shape), [i, j] = [wrap(a, own.length), wrap(b, own.length)];
  [own[i], own[j]] = [own[j], own[i]];
  return view(node, x, own);
}

// A series of terms of one sign, so that nothing cancels.
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; n < 150; n++) sum += term *= (2 * x * x) / (2 * n + 1);
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
const either = (fn) => (a, b) => (a !== a || b !== b ? NaN : fn(a, b));
const add = each((a, b, c) => a + (c ?? 1) * b), subtract = each((a, b, c) => a - (c ?? 1) * b);
const alpha = (op) => (node, a, b) => op(node, a, b, node.kwargs?.alpha ?? 1);
const min = each(either(Math.min), 2), max = each(either(Math.max), 2);

export const OPS = {
  abs: each(Math.abs), neg: each((a) => -a), sign: each(Math.sign),
  exp: each(Math.exp), log: each(Math.log), log1p: each(Math.log1p), expm1: each(Math.expm1),
  sqrt: each(Math.sqrt), rsqrt: each((a) => 1 / Math.sqrt(a)), reciprocal: each((a) => 1 / a),
  sin: each(Math.sin), cos: each(Math.cos), tanh: each(Math.tanh), erf: each(erf),
  sigmoid: each((a) => 1 / (1 + Math.exp(-a))), relu: each((a) => (a > 0 || a !== a ? a : 0)),
  floor: each(Math.floor), round: each(round), isnan: each((a) => a !== a),
  add: alpha(add), sub: alpha(subtract), rsub: each((a, b) => b - a),
  mul: each((a, b) => a * b), div: each((a, b) => a / b), pow: each((a, b) => a ** b),
  minimum: min, maximum: max,
  clamp: (node, x, low, high) => { const up = low == null ? x : max(node, x, low); return same(node, high == null ? up : min(node, up, high)); },
  clamp_min: max,
  eq: each((a, b) => a === b), ne: each((a, b) => a !== b), lt: each((a, b) => a < b),
  le: each((a, b) => a <= b), gt: each((a, b) => a > b), ge: each((a, b) => a >= b),
  logical_not: each((a) => !a), bitwise_not: each((a) => !a),
  logical_and: each((a, b) => a && b), logical_or: each((a, b) => a || b),
  bitwise_and: each((a, b) => a && b), bitwise_or: each((a, b) => a || b),
  "where.self": each((c, a, b) => (c ? a : b)), masked_fill: each((x, m, v) => (m ? v : x)),
  sum: reduce(total),
  mean: reduce((v) => total(v) / v.length), "mean.dim": reduce((v) => total(v) / v.length),
  amax: reduce(highest), amin: reduce(lowest), "prod.dim_int": reduce((v) => v.reduce((a, b) => a * b, 1)),
  any: reduce((v) => v.some((x) => x)), "any.dim": reduce((v) => v.some((x) => x)), "all": reduce((v) => v.every((x) => x)), "all.dim": reduce((v) => v.every((x) => x)),
  linalg_vector_norm: (node, x, ord = 2, dims = null) => reduce((v) => ord === Infinity
    ? highest(v.map(Math.abs)) : total(v.map((a) => Math.abs(a) ** ord)) ** (1 / ord))(node, x, dims),
  argmax: reduce((v) => order(v, true)[0]),
  "var.correction": (node, x, dims) => reduce((v) => variance(v, node.kwargs?.correction ?? 1))(node, x, dims),
  "max.dim": (node, x, dim) => OPS.topk({ outputs: node.outputs.map((o) => ({ ...o, shape: x.shape.map((s, d) => (d === wrap(dim, x.shape.length) ? 1 : s)) })) }, x, 1, dim)
    .map((t, n) => made(node.outputs[n], t.data)),
  _softmax: along((v) => { const top = highest(v), e = v.map((x) => Math.exp(x - top)), s = total(e); return e.map((x) => x / s); }),
  _log_softmax: along((v) => { const top = highest(v), s = Math.log(total(v.map((x) => Math.exp(x - top)))); return v.map((x) => x - top - s); }),
  cumsum: along((v) => { let s = 0; return v.map((x) => (s += x)); }),
  topk: (node, x, k, dim = -1, largest = true) => select(node, x, dim, k, largest),
  sort: (node, x, dim = -1, descending = false) => select(node, x, dim, Infinity, descending),
  "sort.stable": (node, x) => OPS.sort(node, x, node.kwargs.dim, node.kwargs.descending),
  native_layer_norm: (node, x, sizes, weight, bias, eps) => {
    const [out, means, rstds] = node.outputs.map(empty), width = count(sizes);
    for (let i = 0; i < means.length; i++) {
      const values = Array.from(x.data.subarray(i * width, (i + 1) * width)), mean = total(values) / width;
      const rstd = 1 / Math.sqrt(variance(values, 0) + eps);
      values.forEach((v, j) => (out[i * width + j] = (v - mean) * rstd * (weight ? weight.data[j] : 1) + (bias ? bias.data[j] : 0)));
      [means[i], rstds[i]] = [mean, rstd];
    }
    return [out, means, rstds].map((data, n) => made(node.outputs[n], data));
  },
  mm: multiply, bmm: multiply,
  addmm: (node, bias, a, b) => multiply(node, a, b, node.kwargs?.alpha ?? 1, Array.from(spread(bias, node.shape), (v) => (node.kwargs?.beta ?? 1) * v)),
  convolution: convolve,
  view: same, _unsafe_view: same, "squeeze.dim": same, "squeeze.dims": same, unsqueeze: same, _to_copy: same,
  expand: (node, x) => fill(node, spread(x, node.shape)),
  permute: (node, x, dims) => view(node, x, dims.map((d) => strides(x.shape)[wrap(d, x.shape.length)])),
  "transpose.int": swapped, t: (node, x) => (x.shape.length < 2 ? x : swapped(node, x, 0, 1)),
  slice: (node, x, dim = 0, start = 0, end, step = 1) => {
    const own = strides(x.shape), d = wrap(dim, own.length);
    const from = Math.min(Math.max(wrap(start ?? 0, x.shape[d]), 0), x.shape[d]) * own[d];
    return view(node, x, own.map((s, n) => (n === d ? s * step : s)), from);
  },
  "select.int": (node, x, dim, index) => {
    const own = strides(x.shape), d = wrap(dim, own.length);
    return view(node, x, own.filter((_, n) => n !== d), wrap(index, x.shape[d]) * own[d]);
  },
  unfold: (node, x, dim, size, step) => {
    const own = strides(x.shape), d = wrap(dim, own.length);
    return view(node, x, [...own.map((s, n) => (n === d ? s * step : s)), own[d]]);
  },
  split: parts, split_with_sizes: parts,
  "unbind.int": (node, x, dim = 0) => node.outputs.map((part, n) => OPS["select.int"](part, x, dim, n)),
  cat: (node, tensors, dim = 0) => joined(node, tensors, dim),
  flip: (node, x, dims) => {
    const own = strides(x.shape), turned = dims.map((d) => wrap(d, own.length));
    const start = turned.reduce((sum, d) => sum + own[d] * Math.max(x.shape[d] - 1, 0), 0);
    return view(node, x, own.map((s, d) => (turned.includes(d) ? -s : s)), start);
  },
  index_select: (node, x, dim, index) => take(node, x, dim, (_, k) => index.data[k]),
  gather: (node, x, dim, index) => take(node, x, dim, (i) => index.data[i]),
  embedding: (node, weight, ids) => indexed(node, weight, [ids]),
  index: indexed,
  constant_pad_nd: (node, x, pad, value = 0) => {
    const own = strides(node.shape), out = empty(node).fill(value), rank = x.shape.length;
    const before = (d) => pad[2 * (rank - 1 - d)] ?? 0; // negative padding is not exported
    const start = own.reduce((sum, step, d) => sum + step * before(d), 0);
    offsets(x.shape, own, start).forEach((offset, i) => (out[offset] = x.data[i]));
    return made(node, out);
  },
  tril: triangle((above, k) => above <= k), triu: triangle((above, k) => above >= k),
};

// What export.py packed: base64 of the bytes that torch has for it.
export function unpack({ shape, dtype, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer;
  const raw = dtype === "int64" ? Float64Array.from(new BigInt64Array(bytes), Number) : new ARRAYS[dtype](bytes);
  return { shape, dtype, data: raw };
}

const SPECIAL = { inf: Infinity, "-inf": -Infinity, nan: NaN };

export function load(graph) {
  const constants = Object.entries(graph.constants).map(([name, packed]) => [name, unpack(packed)]);
  const resolve = (arg, values) =>
    Array.isArray(arg) ? arg.map((a) => resolve(a, values))
      : arg?.t !== undefined ? (arg.n === undefined ? values[arg.t] : values[arg.t][arg.n])
        : arg?.f !== undefined ? SPECIAL[arg.f] : arg;
  return {
    run(inputs) {
      const values = { ...inputs, ...Object.fromEntries(constants) };
      for (const node of graph.nodes) {
        values[node.name] = OPS[node.op](node, ...resolve(node.args, values));
      }
      const outputs = Object.entries(graph.outputs).map(([name, arg]) => [name, resolve(arg, values)]);
      return Object.fromEntries(outputs);
    },
  };
}
