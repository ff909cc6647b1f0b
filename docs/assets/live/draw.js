// What a live figure shows, as HTML. The page draws in the browser when an input moves,
// tools/views.py without one when the figure is stored.

const times = (count, make) => Array.from({ length: count }, (_, n) => make(n));

// A text control's words, null where there is none, and their rows in an embedding
// table: the place in the list of those that are known, or the one behind it.
export const words = (text, slots) => times(slots, (n) => text.split(/\s+/).filter(Boolean)[n] ?? null);
export const ids = (words, known) => words.map((word) => {
  const at = known.indexOf(word?.toLowerCase());
  return word === null ? -1 : at < 0 ? known.length : at;
});

const round = (value) => +value.toFixed(2);
const escaped = (text) => `${text ?? ""}`.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt()};`);
const tag = (name, attributes, ...inner) => `<${name}${
  Object.entries(attributes).filter(([, value]) => value != null && value !== false)
    .map(([key, value]) => ` ${key}="${value.toFixed ? round(value) : escaped(value)}"`).join("")
}>${inner.flat().join("")}</${name}>`;

const number = (value, digits = 2) => value.toFixed(digits).replace("-", value.toFixed(digits) < 0 ? "−" : "");

// A table for each matrix. Where there is no word, there is no row or column.
function tables(o, { shape, data }, outputs, words) {
  const [height, width] = shape.slice(-2), count = data.length / (height * width);
  const rows = words[o.rows] ?? o.rows, columns = words[o.columns] ?? o.columns;
  const hidden = (label) => label === null && "";
  // What has no label is no header.
  const head = (scope, label) => label === "" ? "<td></td>" : tag("th", { scope, hidden: hidden(label) }, escaped(label));
  const cell = (at, label) => {
    const is = (mask) => outputs[mask]?.data[at % outputs[mask].data.length];
    const value = data[at], off = is(o.hidden), shade = Math.min(1, Math.abs(value) / o.top).toFixed(2);
    return tag("td", {
      class: !off && value < 0 && shade > 0 && "negative",
      style: !off && `--v:${shade}`,
      hidden: hidden(label),
      "aria-current": o.marked && `${!!is(o.marked)}`,
    }, off ? "·" : number(value, o.digits));
  };
  return times(count, (n) => {
    const title = o.title?.map ? o.title[n] : o.title;
    return tag("table", { class: "cells" }, title ? tag("caption", {}, escaped(title)) : "",
      columns ? tag("thead", {}, tag("tr", {}, rows ? "<td></td>" : "", columns.map((label) => head("col", label)))) : "",
      tag("tbody", {}, times(height, (i) => tag("tr", { hidden: hidden(rows?.[i]) }, rows ? head("row", rows[i]) : "",
        times(width, (j) => cell((n * height + i) * width + j, columns?.[j]))))));
  }).join("");
}

// A plot of 420 by 230, its axes, and where a value stands on them.
const LEFT = 46, RIGHT = 408, TOP = 12, BOTTOM = 190;
const place = (value, [low, high], start, end) =>
  start + ((Math.min(Math.max(value, low), high) - low) / (high - low)) * (end - start);
const across = (value, o) => place(value, o.xlim, LEFT, RIGHT);
const up = (value, o) => place(value, o.ylim, BOTTOM, TOP);

const text = (x, y, anchor, label) => tag("text", { x, y, "text-anchor": anchor }, escaped(label));
const image = (height, said, ...inner) => tag("svg", { viewBox: `0 0 420 ${height}`, role: "img", "aria-label": said }, ...inner);

const chart = (o, said, inner) => image(230, said, tag("g", { class: "axes", "aria-hidden": "true" },
  o.yticks.map(([value, label]) => {
    const y = up(value, o);
    return tag("line", { x1: LEFT, x2: RIGHT, y1: y, y2: y }) + text(LEFT - 6, y + 4, "end", label);
  }),
  o.xticks.map(([value, label]) => text(across(value, o), BOTTOM + 16, "middle", label)),
  text((LEFT + RIGHT) / 2, 224, "middle", o.xlabel),
  tag("g", { transform: `translate(11 ${(TOP + BOTTOM) / 2}) rotate(-90)` }, text(0, 0, "middle", o.ylabel)),
), inner);

const VIEWS = {
  heatmap: tables,

  lines(o, _, outputs) {
    const series = o.series.map(([label, name], n) => [label, [...outputs[name].data], `s${n + 1}`]);
    const said = series.map(([label, v]) => `${label}: ` + (v.length
      ? `from ${number(v[0])} to ${number(v.at(-1))}, lowest ${number(Math.min(...v))}, highest ${number(Math.max(...v))}.`
      : "no values."));
    const key = series.map(([label, , name]) => tag("li", { class: name }, escaped(label)));
    return (key[1] ? tag("ul", { class: "key", "aria-hidden": "true" }, key) : "") +
      chart(o, said.join(" "), series.map(([, values, name]) => tag("polyline", {
        class: `series ${name}`, points: values.map((value, k) => `${round(across(o.x[k], o))},${round(up(value, o))}`).join(" "),
      })));
  },

  bars(o, { data }) {
    const zero = up(Math.max(o.ylim[0], 0), o);
    return chart(o, `${o.labels.map((label, n) => `${label} ${number(data[n])}`).join(", ")}.`, o.labels.map((_, n) => {
      const x = across(n + 0.15, o), y = up(data[n], o);
      return tag("rect", { class: "s1", x, width: across(n + 0.85, o) - x, y: Math.min(y, zero), height: Math.abs(zero - y) });
    }));
  },

  scatter(o, { data, shape }, outputs) {
    const cx = across(0, o), cy = up(0, o), radius = outputs[o.ring]?.data[0];
    const points = times(shape[0], (n) => [data[2 * n], data[2 * n + 1], o.labels?.[n] ?? ""]);
    return chart(o, `${points.map(([a, b, label]) => `${label} at ${number(a)}, ${number(b)}`.trim()).join("; ")}.`, [
      o.ring ? tag("ellipse", { class: "ring", cx, cy, rx: across(radius, o) - cx, ry: cy - up(radius, o) }) : "",
      ...points.map(([a, b, label], n) => {
        const x = across(a, o), y = up(b, o), name = `s${o.arrows ? n + 1 : 1}`;
        return tag("g", { transform: `translate(${round(x)} ${round(y)})` },
          o.arrows ? tag("line", { class: name, x2: cx - x, y2: cy - y }) : "",
          tag("circle", { class: name, r: 4 }), text(7, 4, null, label));
      }),
    ]);
  },

  network(o, { data, shape: [, width] }, _, words) {
    const [left, right] = [o.left, o.right].map((given) => (words[given] ?? given).map((label) => label ?? ""));
    const height = 30 * Math.max(left.length, width), y = (n, side) => ((n + 0.5) * height) / side.length;
    const rows = left.map((_, i) => [...data].slice(i * width, (i + 1) * width));
    const said = rows.map((row, i) => {
      const most = Math.max(...row);
      return `${left[i]} mostly to ${right[row.indexOf(most)]}, ${number(most)}`;
    });
    return image(height, `${said.join("; ")}.`,
      rows.flatMap((row, i) => row.map((value, j) =>
        tag("line", { class: "s1", x1: 110, y1: y(i, left), x2: 310, y2: y(j, right), "stroke-width": 6 * value }))),
      left.map((label, n) => text(100, y(n, left) + 4, "end", label)),
      right.map((label, n) => text(320, y(n, right) + 4, "start", label)));
  },
};

export const draw = (view, outputs, words) => VIEWS[view.kind](view, outputs[view.output], outputs, words);
