// Changes, newest first: why, what was decided, and a bar of where the seconds went.

import { el, keyed, put, say } from "./dom.js";
import { bytes, clock, count, day, intervals, list, seconds, several } from "./words.js";

export const KINDS = {
  begin: "Begins", loss: "Worker lost", leave: "Worker left", join: "Worker joined", move: "Blocks moved", other: "New connections", resume: "Resume",
  failure: "Failure", interrupt: "Interrupt", save: "Save", end: "End",
};

const PARTS = {
  detect: ["detect", "from the last sign of life of whoever was lost until it was noticed: at most so long"],
  halt: ["halt", "until all had come out of what they did; where nobody was lost: the rest of the step"],
  edit: ["edit", "new groups, engine and optimizer for the new view"],
  replan: ["replan", "what is read from where"],
  restore: ["restore", "states of lost members, read from copies"],
  migrate: ["migrate", "states that have another owner now, read from those who had them"],
  verify: ["verify", "taken into use, and compared"],
  wait: ["wait", "messages, and waiting for the others"],
  redo: ["redo", "until the next step was taken: what was not kept is computed again"],
};

export function showLegend() {
  document.getElementById("legend").replaceChildren(
    ...Object.entries(PARTS).map(([part, [name, what]]) =>
      el("li", { title: what }, el("i", { class: "swatch", data: { part } }), name)),
  );
}

export function showChanges(state) {
  const found = state.changes.filter((change) => change.kind !== "begin" || state.changes_in_all === 1);
  const shown = found.filter((change) => change.kind !== "begin");
  const nothing = document.getElementById("no-changes");
  nothing.hidden = shown.length > 0;
  say(nothing, state.run.elastic ? "Nobody was lost, came or went so far."
    : state.run.state === "empty" ? "Nothing has happened yet."
    : "This run is not elastic: its workers stay the same from beginning to end. With cluster.elastic = true they may come and go.");
  document.getElementById("legend").hidden = !shown.length;
  const note = document.getElementById("changes-note");
  const begins = state.changes_in_all > state.changes.length ? `, the newest ${shown.length} are shown` : "";
  const all = state.changes_in_all - (state.changes_in_all > state.changes.length ? 0 : state.changes.length - shown.length);
  say(note, shown.length ? `${several(all, "change")}${begins}` : "");
  keyed(document.getElementById("changes"), shown, (change) => `${change.time}-${change.epoch}`, makeChange, fillChange);
}

function makeChange() {
  return el("li", { class: "change" },
    el("div", { class: "change-head" }), el("p", { class: "why" }), el("div", { class: "bar", role: "img" }),
    el("p", { class: "outcome" }), el("details", {}, el("summary", {}, "Before, after, and by member"), el("div", { class: "more" })));
}

function fillChange(box, change) {
  const [head, why, bar, outcome, details] = box.children;
  box.dataset.kind = change.kind;
  head.replaceChildren(
    el("span", { class: "chip", data: { kind: change.kind } }, KINDS[change.kind]),
    el("strong", {}, title(change)),
    el("span", { class: "when" }, `epoch ${change.epoch}, after step ${count(change.step)}, `,
      el("time", { datetime: new Date(change.time * 1000).toISOString(), title: day(change.time) }, clock(change.time))),
  );
  say(why, change.lost.length ? reasons(change) : change.why);
  const total = change.timeline.reduce((sum, one) => sum + one.seconds, 0);
  const told = change.timeline.map((one) => `${nameOf(one.part, change)} ${seconds(one.seconds)}`).join(", ");
  bar.setAttribute("aria-label", `${told}; ${seconds(total)} in all`);
  bar.replaceChildren(...change.timeline.map((one) => segment(one, total, change)));
  outcome.replaceChildren(...outcomes(change, total).map((text) => el("span", {}, text)));
  const rows = Object.entries(change.parts);
  put(details.lastElementChild,
    members("before", change.stages_before, change, change.went),
    members("after", change.stages_after, change, change.came),
    change.planned.length ? el("dl", { class: "plan" }, ...change.planned.flatMap((one) => [
      el("dt", {}, one.axis), el("dd", {}, el("strong", {}, one.decision), `: ${one.why}${quicker(one)}`)])) : null,
    rows.length ? el("div", { class: "table" }, table(change, rows)) : null);
}

function quicker({ before, after }) {
  if (typeof before !== "number" || typeof after !== "number" || !(before > 0)) return "";
  return ` (a step takes ${Math.round((100 * after) / before)}% of the time)`;
}

/** A view's members by stage; those that are in the one and not in the other stand out. */
function members(name, stages, change, marked) {
  if (!stages?.length) return null;
  const lost = change.lost.map((one) => one.member);
  return el("div", { class: "view", data: { name } },
    el("span", { class: "view-name" }, name),
    ...stages.map((stage) => el("span", { class: "view-stage" },
      stage.layers ? el("small", {}, `blocks ${intervals([[stage.layers[0], stage.layers[1] - 1]])}: `) : null,
      ...stage.members.map((number) => el("span", {
        class: "member", data: { mark: marked.includes(number) ? (lost.includes(number) ? "lost" : name === "after" ? "came" : "left") : "" },
      }, String(number))))));
}

function title(change) {
  const parts = [];
  const lost = change.lost.map((one) => one.member);
  const left = change.went.filter((number) => !lost.includes(number));
  if (lost.length) parts.push(`lost ${list(lost)}`);
  if (left.length) parts.push(`${list(left)} left`);
  if (change.came.length) parts.push(`${list(change.came)} joined`);
  const members = change.before.length && change.before.length !== change.after.length ? `${change.before.length} → ${change.after.length} workers` : several(change.after.length, "worker");
  return `${parts.length ? `${parts.join("; ")}: ` : ""}${members}`;
}

function reasons(change) {
  const told = change.lost.map((one) => `Worker ${one.member} ${one.why}.`);
  const came = change.came.length ? [`${change.came.length > 1 ? "Workers" : "Worker"} ${list(change.came)} came in the same change.`] : [];
  return [...told, ...came].join(" ");
}

function nameOf(part, change) {
  if (part === "redo" && !change.cut_short) return "next step";
  if (part === "halt" && !change.cut_short) return "end of the step";
  return PARTS[part]?.[0] ?? part;
}

function segment(one, total, change) {
  const share = total > 0 ? one.seconds / total : 0;
  const name = nameOf(one.part, change);
  const took = `${one.part === "detect" ? "≤ " : ""}${seconds(one.seconds)}`;
  const text = share > 0.16 ? `${name} ${took}` : share > 0.075 ? name : "";
  const usual = !change.cut_short && ["halt", "redo"].includes(one.part); // the run goes on as ever meanwhile
  return el("span", {
    class: usual ? "segment usual" : "segment", data: { part: one.part }, style: { "flex-grow": String(Math.max(share, 0.004)) },
    title: `${name} ${took}: ${PARTS[one.part]?.[1] ?? ""}`,
  }, text);
}

function outcomes(change, total) {
  const told = [];
  if (change.gap !== null) {
    const usual = change.usual === null ? "" : ` (a usual step: ${seconds(change.usual)})`;
    told.push(`${seconds(change.gap)} from the step before to the step after${usual}`);
  } else told.push(`${seconds(total)} so far; the next step has not been taken`);
  told.push(change.redone ? `${several(change.redone, "step")} taken again` : "no step lost");
  if (change.kept) told.push(`${several(change.kept, "micro-batch", "micro-batches")} kept`);
  told.push(`${several(change.shards_moved ?? 0, "shard")} moved`);
  const moved = Object.values(change.bytes).reduce((sum, one) => sum + Object.values(one).reduce((a, b) => a + b, 0), 0);
  if (moved) told.push(`${bytes(moved)} read`);
  return told;
}

function table(change, rows) {
  const names = ["groups", "engine", "plan", "restore", "migrate", "load", "verify"];
  const shown = names.filter((name) => rows.some(([, parts]) => parts[name] !== undefined));
  return el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "member"), ...shown.map((name) => el("th", { scope: "col" }, name)), el("th", { scope: "col" }, "read"))),
    el("tbody", {}, ...rows.map(([number, parts]) => {
      const read = Object.values(change.bytes[number] ?? {}).reduce((a, b) => a + b, 0);
      return el("tr", { class: Number(number) === change.slowest ? "slowest" : null },
        el("th", { scope: "row" }, number, Number(number) === change.slowest ? el("small", {}, " slowest") : null),
        ...shown.map((name) => el("td", {}, parts[name] === undefined ? "" : seconds(parts[name]))),
        el("td", {}, read ? bytes(read) : ""));
    })));
}
