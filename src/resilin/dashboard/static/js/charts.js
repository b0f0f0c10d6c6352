// Curves by uPlot, with a line at every event. Values come thinned out from the server, anew for whatever part is seen.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { el, say } from "./dom.js";
import { KINDS } from "./changes.js";
import { clock, count, day, precise, seconds, short, ticks } from "./words.js";

const HEIGHT = 210;
const NEAR = 7; // pixels from a mark at which it is told
const CURVES = [
  { name: "loss", title: "Loss", value: precise, evaluated: true },
  { name: "throughput", title: "Throughput", value: (v, unit) => `${short(v)} ${unit}/s`, zero: true },
  { name: "seconds", title: "Time for a step", value: seconds, zero: true, axis: seconds },
  { name: "grad_norm", title: "Norm of the gradient", value: precise, zero: true },
];
const SYNC = "run";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Charts {
  /** @param parent where the charts go. @param onRange called with [low, high] when a part is chosen. */
  constructor(parent, onRange) {
    this.parent = parent;
    this.onRange = onRange;
    this.by = "step";
    this.unit = "units";
    this.marks = [];
    this.hidden = new Set(["save"]);
    this.plots = [];
    this.shape = "";
    this.watching = new ResizeObserver(() => this.resize());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.again());
  }

  get width() {
    return this.plots[0]?.box.querySelector(".plot").clientWidth || 600;
  }

  /** Show curves: what `/api/curves` gives, the run's evaluations, its marks, the newest value of each curve. */
  show(curves, evaluations, marks, by, unit, range, last) {
    this.shown = [curves, evaluations, marks, by, unit, range, last];
    const names = Object.keys(evaluations);
    const shape = JSON.stringify([by, names, unit]);
    this.by = by;
    this.unit = unit;
    this.marks = marks.filter((mark) => mark[by] !== null && mark[by] !== undefined);
    this.range = range;
    if (shape !== this.shape) {
      this.shape = shape;
      this.build(names);
    }
    for (const plot of this.plots) {
      const own = curves[plot.curve.name];
      const series = [own, own.mean];
      if (plot.curve.evaluated) for (const name of names) series.push({ x: evaluations[name][by], y: evaluations[name].loss });
      plot.dense = own.mean.x.length > 0;
      plot.chart.setData(joined(series), false);
      this.scale(plot, curves);
      say(plot.value, last[plot.curve.name] === null ? "–" : plot.curve.value(last[plot.curve.name], unit));
    }
  }

  again() {
    if (!this.shown) return;
    this.shape = "";
    this.show(...this.shown);
  }

  /** All charts have one horizontal range. */
  scale(plot, curves) {
    const { x } = curves.loss;
    let [low, high] = this.range ?? [x[0] ?? 0, x.at(-1) ?? 1];
    if (!(high > low)) high = low + 1;
    plot.chart.batch(() => plot.chart.setScale("x", { min: low, max: high }));
    plot.chart.batch(() => plot.chart.redraw(true, true)); // the scale may be what it was, and the values others
  }

  build(names) {
    for (const plot of this.plots) plot.chart.destroy();
    this.watching.disconnect();
    this.parent.replaceChildren();
    this.plots = CURVES.map((curve) => {
      const value = el("span", { class: "now" });
      const told = el("div", { class: "told", "aria-hidden": "true" });
      const place = el("div", { class: "plot" });
      const box = el("figure", { class: "chart" },
        el("figcaption", {}, el("span", {}, curve.title), value), place, told);
      this.parent.append(box);
      const plot = { curve, box, value, told, names };
      plot.chart = new uPlot(this.options(plot, names, place.clientWidth || 600), [[]], place);
      this.watching.observe(place);
      return plot;
    });
  }

  resize() {
    for (const plot of this.plots) {
      const width = plot.box.querySelector(".plot").clientWidth;
      if (width && Math.abs(width - plot.chart.width) > 1) plot.chart.setSize({ width, height: HEIGHT });
    }
  }

  options(plot, names, width) {
    const { curve } = plot;
    const main = colour("--curve");
    const axis = {
      stroke: colour("--muted"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    const series = [{}, {
      stroke: () => (plot.dense ? colour("--curve-faint") : main), width: 1.25, points: { show: sparse }, spanGaps: false,
      label: curve.title,
    }];
    series.push({ stroke: main, width: 2, points: { show: false }, spanGaps: true, label: "mean" });
    if (curve.evaluated) {
      names.forEach((name, place) => series.push({
        stroke: colour(`--eval-${place % 3}`), width: 1.5, spanGaps: true, label: name,
        points: { show: (u, at) => u.data[at].filter((v) => v !== null && v !== undefined).length < 60, size: 5, fill: colour(`--eval-${place % 3}`) },
      }));
    }
    return {
      width, height: HEIGHT, series,
      legend: { show: false },
      cursor: { sync: { key: SYNC }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: { range: (u, low, high) => yRange(low, high, curve.zero) } },
      axes: [
        { ...axis, size: 28, space: 70, incrs: this.by === "time" ? TIMES : undefined,
          values: (u, splits, at, space, step) => splits.map((v) => (this.by === "time" ? moment(v, step) : count(v))) },
        { ...axis, size: 58, values: (u, splits, at, space, step) => splits.map((v) => (curve.axis ?? ticks)(v, step)) },
      ],
      hooks: {
        drawAxes: [(u) => this.drawMarks(u)],
        setCursor: [(u) => this.tell(plot, u)],
        setSelect: [(u) => this.choose(u)],
      },
    };
  }

  seen(mark) {
    return !this.hidden.has(mark.kind);
  }

  drawMarks(u) {
    const { ctx } = u;
    const { left, top, width, height } = u.bbox;
    ctx.save();
    for (const mark of this.marks) {
      if (!this.seen(mark)) continue;
      const x = u.valToPos(mark[this.by], "x", true);
      if (x < left || x > left + width) continue;
      ctx.strokeStyle = ctx.fillStyle = colour(`--kind-${mark.kind}`);
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash(mark.kind === "loss" ? [] : [4 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.globalAlpha = 0.75;
      ctx.beginPath();
      ctx.moveTo(x, top);
      ctx.lineTo(x, top + height);
      ctx.stroke();
      const size = 4 * devicePixelRatio;
      ctx.globalAlpha = 1;
      ctx.beginPath();
      ctx.moveTo(x - size, top);
      ctx.lineTo(x + size, top);
      ctx.lineTo(x, top + 1.6 * size);
      ctx.fill();
    }
    ctx.restore();
  }

  tell(plot, u) {
    const { left, idx } = u.cursor;
    const own = u.root.parentElement === plot.box.querySelector(".plot");
    if (!own || left < 0 || idx === null || idx === undefined) {
      plot.told.hidden = true;
      return;
    }
    const at = u.posToVal(left, "x");
    const lines = [this.by === "time" ? `${day(at)} ${clock(at)}` : `step ${count(Math.round(u.data[0][idx] ?? at))}`];
    u.series.forEach((series, place) => {
      if (!place || series.label === "mean") return;
      const value = nearest(u.data, place, idx);
      if (value !== null) lines.push(`${series.label.toLowerCase()} ${plot.curve.value(value, this.unit)}`);
    });
    const marks = this.marks.filter((mark) => this.seen(mark) && Math.abs(u.valToPos(mark[this.by], "x") - left) <= NEAR);
    plot.told.replaceChildren(
      el("div", {}, lines.join("   ")),
      ...marks.slice(-3).map((mark) => el("div", { class: "mark", data: { kind: mark.kind } }, `${KINDS[mark.kind] ?? mark.kind}: ${mark.text}`)),
    );
    plot.told.hidden = false;
  }

  choose(u) {
    const { left, width } = u.select;
    if (width < 8) return;
    const range = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.onRange(range);
  }

  /** Buttons that show and hide marks of a kind. */
  showKinds(parent, marks) {
    const kinds = [...new Set(marks.map((mark) => mark.kind))].sort();
    const told = kinds.join();
    if (parent.told === told) return;
    parent.told = told;
    parent.replaceChildren(...kinds.map((kind) => {
      const button = el("button", { type: "button", class: "kind", data: { kind }, "aria-pressed": String(!this.hidden.has(kind)) }, el("i"), KINDS[kind] ?? kind);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(kind)) this.hidden.add(kind);
        button.setAttribute("aria-pressed", String(!this.hidden.has(kind)));
        for (const plot of this.plots) plot.chart.redraw(false, true);
      });
      return button;
    }));
  }
}

const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];

function moment(time, step) {
  if (step >= 86400) return day(time).slice(5);
  return clock(time, step < 60);
}

const sparse = (u, place) => u.data[0].length < 40 && u.data[place].length < 40;

function yRange(low, high, zero) {
  if (low === null || high === null) return [0, 1];
  if (zero) return [0, high > 0 ? high * 1.08 : 1];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

/** The value at a place, or the nearest one to its left. */
function nearest(data, series, idx) {
  for (let place = idx; place >= 0 && idx - place < 400; place -= 1) {
    const value = data[series][place];
    if (value !== null && value !== undefined) return value;
  }
  return null;
}

/** Series of points of their own as columns over one x. A gap stays a gap where a series has a null of its own. */
function joined(series) {
  return uPlot.join(series.map(({ x, y }) => [x, y]));
}
