// The head of the page: what state the run is in, and its numbers at a glance.

import { el, keyed, put, say } from "./dom.js";
import { count, precise, seconds, several, short } from "./words.js";

export function showHead(state) {
  const { run, read } = state;
  say(document.getElementById("name"), run.name);
  const place = document.getElementById("state");
  place.dataset.state = run.state;
  place.dataset.phase = run.phase;
  say(place, run.words);
  const part = read.of > 0 ? `: ${Math.floor((100 * read.bytes) / read.of)}%` : "";
  const trouble = state.trouble || (read.caught_up ? "" : `Reading the log${part}`);
  const box = document.getElementById("trouble");
  box.hidden = !trouble;
  box.dataset.kind = state.trouble ? "trouble" : "reading";
  say(box, trouble);
  document.title = run.total ? `${run.step}/${run.total} ${run.name} – resilin` : `${run.name} – resilin`;
}

export function showFacts(state) {
  const { run } = state;
  const parent = document.getElementById("facts");
  const running = run.state === "running";
  const facts = [];
  facts.push({
    key: "step", name: "Step", value: count(run.step), more: run.total ? `of ${count(run.total)}` : "",
    share: run.total ? run.step / run.total : null,
  });
  const evaluated = Object.entries(state.evaluations)[0];
  const last = evaluated ? evaluated[1].loss.at(-1) : null;
  facts.push({
    key: "loss", name: "Loss", value: precise(run.last.loss), more: last === null || last === undefined ? "" : `${evaluated[0]} ${precise(last)}`,
  });
  facts.push({
    key: "rate", name: "Throughput", value: short(run.rate), unit: `${run.unit}/s`,
    more: run.step_seconds === null ? "" : `${seconds(run.step_seconds)} a step`,
  });
  if (run.workers !== null) {
    facts.push({
      key: "workers", name: running ? "Workers" : "Workers at the end", value: count(run.workers),
      more: run.epoch === null ? "" : `epoch ${run.epoch}, ${several(Math.max(0, state.changes_in_all - 1), "change")}`,
    });
  } else if (state.map.workers) {
    facts.push({ key: "workers", name: "Workers", value: count(state.map.workers), more: state.map.degrees });
  }
  const begun = state.first_time;
  const elapsed = begun === null ? null : (running ? state.now : state.last_time) - begun;
  facts.push(
    running
      ? { key: "time", name: "Time left", value: seconds(run.left_seconds), more: begun === null ? "" : `${seconds(elapsed)} since it began` }
      : { key: "time", name: "From first to last event", value: seconds(elapsed), more: run.saved === null ? "nothing saved" : `saved at step ${count(run.saved)}` },
  );
  if (run.digest) facts.push({ key: "digest", name: "Digest of the weights", value: run.digest, mono: true, more: "equal digests: equal weights" });
  else if (run.parameters) {
    facts.push({ key: "model", name: "Parameters", value: short(run.parameters), more: run.device ?? "" });
  }
  keyed(parent, facts, (one) => one.key, () => el("div", { class: "fact" }), fill);
}

function fill(box, one) {
  put(
    box,
    el("span", { class: "fact-name" }, one.name),
    el("span", { class: one.mono ? "fact-value mono" : "fact-value" }, one.value, one.unit ? el("small", {}, ` ${one.unit}`) : null),
    el("span", { class: "fact-more" }, one.more || "\u00a0"),
    one.share === null || one.share === undefined
      ? null
      : el("progress", { max: 1, value: Math.min(1, one.share).toFixed(4), "aria-label": "Steps taken" }),
  );
}
