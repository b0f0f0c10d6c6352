// Asks the server once a second, and shows what has changed.

import { Charts } from "./charts.js";
import { showChanges, showLegend } from "./changes.js";
import { el, say } from "./dom.js";
import { showFacts, showHead } from "./facts.js";
import { showMap } from "./map.js";

const PERIOD = 1000; // milliseconds between questions while the run goes on
const SLOW = 5000; // once it has ended, or while nobody looks

const by = () => document.querySelector("input[name=by]:checked").value;
const place = new URLSearchParams(location.search);
let run = place.get("run");
let range = null;
let version = null;
let curves = null;
let state = null;
let timer = null;

const charts = new Charts(document.getElementById("charts"), (chosen) => {
  range = chosen;
  draw();
});

async function get(path, query) {
  const url = new URL(path, location.origin);
  for (const [key, value] of Object.entries(query)) if (value !== null) url.searchParams.set(key, value);
  const answer = await fetch(url, { cache: "no-store" });
  if (answer.status === 401) throw new Error("the token is no longer the right one: open the address that `resilin watch` has printed");
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  return answer.json();
}

async function draw() {
  document.getElementById("reset").hidden = range === null;
  const none = state.steps === 0;
  document.getElementById("no-steps").hidden = !none;
  document.getElementById("charts").hidden = none;
  document.getElementById("kinds").hidden = none;
  if (none) return;
  const [low, high] = range ?? [null, null];
  const asked = by();
  curves = await get("/api/curves", { run, by: asked, low, high, points: Math.round(Math.max(200, charts.width * 1.5)) });
  charts.show(curves, state.evaluations, state.marks, asked, state.run.unit, range, state.run.last);
  charts.showKinds(document.getElementById("kinds"), state.marks);
}

async function look() {
  clearTimeout(timer);
  let pause = PERIOD;
  try {
    state = await get("/api/state", { run });
    showHead(state);
    showFacts(state);
    showMap(state);
    showChanges(state);
    if (state.version !== version) {
      await draw();
      version = state.version;
    }
    const reading = !state.read.caught_up;
    pause = reading ? PERIOD / 4 : document.hidden || !["running", "empty"].includes(state.run.state) ? SLOW : PERIOD;
    document.body.dataset.ready = reading ? "" : "yes";
  } catch (error) {
    const box = document.getElementById("trouble");
    box.hidden = false;
    box.dataset.kind = "trouble";
    say(box, error instanceof TypeError ? "The server does not answer: has `resilin watch` been ended?" : `${error.message}`);
  }
  timer = setTimeout(look, pause);
}

async function begin() {
  showLegend();
  try {
    const told = await get("/api/runs", {});
    say(document.getElementById("foot"), `resilin ${told.version}, ${told.folder}`);
    if (run === null || !told.runs.includes(run)) run = told.runs[0];
    if (told.runs.length > 1) {
      const choice = document.getElementById("runs");
      choice.replaceChildren(...told.runs.map((name) => el("option", { value: name, selected: name === run ? true : null }, name)));
      document.getElementById("choose").hidden = false;
      document.querySelector(".which").classList.add("several");
      choice.addEventListener("change", () => {
        run = choice.value;
        [range, version] = [null, null];
        history.replaceState(null, "", `?run=${encodeURIComponent(run)}`);
        look();
      });
    }
  } catch {
    // Said by the first look.
  }
  for (const input of document.querySelectorAll("input[name=by]")) {
    input.addEventListener("change", () => {
      range = null;
      draw();
    });
  }
  document.getElementById("reset").addEventListener("click", () => {
    range = null;
    draw();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) look();
  });
  look();
}

begin();
