// The cluster as a grid: a row for each stage, a cell for each replica, and who waits or leaves below.

import { el, keyed, put, say } from "./dom.js";
import { intervals, list, seconds, several } from "./words.js";

const WORDS = {
  running: "running", waiting: "waits for a place", starting: "starting", leaving: "leaving", lost: "lost",
  ended: "ended",
};

export function showMap(state) {
  const { map, run } = state;
  const parent = document.getElementById("map");
  const note = document.getElementById("map-note");
  if (map.kind === "elastic" && (map.stages.length || map.others.length)) {
    const shards = map.stages[0]?.shards;
    say(note, map.stages.length
      ? `epoch ${map.epoch}, ${several(map.stages.length, "stage")}, ${machines(map)}${several(map.micros, "micro-batch", "micro-batches")} a step, ${shards} virtual shards of the optimizer's states`
      : "no view yet: workers are starting");
    if (run.state !== "running" && map.stages.length) say(note, `as it was last: ${note.textContent}`);
    grid(parent, map, state);
  } else if (map.kind === "fixed") {
    say(note, `fixed for this run: ${map.degrees}${map.workers > 1 ? `, ${map.sharding}` : ""}${map.micros ? `, ${several(map.micros, "micro-batch", "micro-batches")} a step` : ""}`);
    grid(parent, map, state);
  } else {
    say(note, "");
    const why = map.kind === "unknown" ? `The layout is not known: ${map.why}` : "There is no cluster to show until the run has begun.";
    keyed(parent, [{ key: "nothing", why }], (one) => one.key, () => el("p", { class: "nothing" }), (box, one) => say(box, one.why));
  }
}

function machines(map) {
  const hosts = new Set(map.stages.flatMap((stage) => stage.members.map((one) => one.host)));
  return hosts.size > 1 ? `${several(hosts.size, "machine")}, ` : "";
}

const DENSE = 24; // cells of a stage beyond which they are small

function grid(parent, map, state) {
  const several_stages = map.stages.length > 1;
  const rows = map.stages.map((stage, place) => ({
    key: `stage-${place}`, title: several_stages ? `Stage ${place}` : "", layers: stage.layers, cells: stage.members,
    only: !several_stages, shards: stage.shards, kind: map.kind, inner: [map.context, map.tensor], device: state.run.device,
  }));
  if (map.others?.length) rows.push({ key: "others", title: "Not in the view", cells: map.others, kind: "elastic" });
  keyed(parent, rows, (row) => row.key, makeRow, fillRow);
}

function makeRow() {
  return el("div", { class: "stage" }, el("div", { class: "stage-name" }), el("div", { class: "cells", role: "list" }));
}

function fillRow(box, row) {
  const [name, cells] = box.children;
  box.classList.toggle("bare", !row.title);
  box.classList.toggle("only", row.only);
  box.classList.toggle("dense", row.cells.length > DENSE);
  name.replaceChildren(
    el("strong", {}, row.title),
    row.layers ? el("span", {}, `blocks ${intervals([[row.layers[0], row.layers[1] - 1]])}`) : "",
  );
  if (row.kind === "fixed") keyed(cells, row.cells, (one) => one.ranks[0], () => el("div", { class: "cell", role: "listitem" }), (cell, one) => fillFixed(cell, one, row));
  else keyed(cells, row.cells, (one) => one.number, makeCell, (cell, one) => fillCell(cell, one, row));
}

function makeCell(one) {
  const cell = el("div", { class: "cell", role: "listitem", tabindex: 0 });
  const light = (on) => () => lightUp(one.number, on);
  cell.addEventListener("mouseenter", light(true));
  cell.addEventListener("mouseleave", light(false));
  cell.addEventListener("focus", light(true));
  cell.addEventListener("blur", light(false));
  return cell;
}

/** Show who keeps copies of a member's states. */
function lightUp(number, on) {
  const cells = [...document.querySelectorAll("#map .cell")];
  const holders = cells.find((cell) => cell.dataset.key === String(number))?.holders ?? [];
  for (const cell of cells) cell.classList.toggle("holds", on && holders.includes(Number(cell.dataset.key)));
}

function fillCell(cell, one, row) {
  const { shards } = row;
  cell.dataset.state = one.state;
  cell.holders = one.copies_at ?? [];
  const inside = one.shards !== undefined;
  const doing = one.doing ? `${one.doing}${one.seconds >= 1 ? ` for ${seconds(one.seconds)}` : ""}` : "";
  const facts = inside
    ? [
        ...(one.part == null ? [] : [["part of each matrix", String(one.part)]]),
        ...(one.experts == null ? [] : [["experts", intervals(one.experts) || "none"]]),
        ["micro-batches", one.micros ? intervals([one.micros]) : "–"],
        ["owns shards", `${one.shard_count} of ${shards}`],
        ["copies at", list(one.copies_at)],
        ["keeps copies of", list(one.keeps)],
      ]
    : [];
  const told = [`member ${one.number}`, WORDS[one.state] ?? one.state, one.host, doing, ...facts.map((fact) => fact.join(" "))].filter(Boolean).join(", ");
  cell.setAttribute("aria-label", told);
  cell.title = row.cells.length > DENSE ? told : "";
  put(
    cell,
    el("div", { class: "cell-head" },
      el("span", { class: "number" }, String(one.number)),
      el("span", { class: "cell-state" }, WORDS[one.state] ?? one.state),
      el("span", { class: "host" }, one.host ?? ""),
    ),
    one.state === "ended" ? null : el("div", { class: "doing", title: doing }, doing || "\u00a0"),
    inside ? ribbon(one.shards, shards) : null,
    facts.length ? el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])) : null,
  );
}

/** Which of a stage's virtual shards a member owns. */
function ribbon(owned, shards) {
  const parts = owned.map(([first, last]) =>
    el("i", { style: { left: `${(100 * first) / shards}%`, width: `${(100 * (last - first + 1)) / shards}%` } }));
  return el("div", { class: "ribbon", title: `virtual shards ${intervals(owned)} of ${shards}` }, ...parts);
}

function fillFixed(cell, one, row) {
  const [first, last] = one.ranks;
  const [context, tensor] = row.inner;
  const inner = [context > 1 ? `context ${context}` : "", tensor > 1 ? `tensor ${tensor}` : ""].filter(Boolean).join(" x ");
  const facts = [];
  if (inner) facts.push(["divided by", inner]);
  if (one.micros) facts.push(["micro-batches", intervals([one.micros])]);
  put(
    cell,
    el("div", { class: "cell-head" },
      el("span", { class: "number" }, first === last ? String(first) : `${first}–${last}`),
      el("span", { class: "host" }, row.cells.length === 1 && row.device ? row.device : ""),
    ),
    facts.length ? el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])) : null,
  );
}
