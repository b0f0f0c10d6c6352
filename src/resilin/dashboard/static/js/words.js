// Numbers for people.

const whole = new Intl.NumberFormat("en");

export const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));

/** "1 worker", "3 workers". */
export const several = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** Three digits that matter, and a letter for thousands: 3.43k, 12.1M. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [letter, unit] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= unit) return `${digits(value / unit)}${letter}`;
  }
  return digits(value);
}

function digits(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

/** A value on an axis whose marks are so far apart. */
export function ticks(value, step) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [letter, unit] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= unit) return `${(value / unit).toFixed(decimals(step / unit))}${letter}`;
  }
  return size < 1e-3 ? value.toExponential(1) : value.toFixed(decimals(step));
}

function decimals(step) {
  for (let found = 0; found < 6; found += 1) {
    const whole_steps = step * 10 ** found;
    if (Math.abs(whole_steps - Math.round(whole_steps)) < 1e-6 * whole_steps) return found;
  }
  return 6;
}

/** A loss, a norm: four decimals, fewer where it is large. */
export function precise(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(3);
  return value.toFixed(size >= 100 ? 2 : 4);
}

/** Seconds: 41 ms, 2.31 s, 3 min 20 s, 1 h 05 min, 2 d 3 h. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0 s";
  if (value < 0.001) return `${(value * 1e3).toFixed(2)} ms`;
  if (value < 0.0995) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 59.95) return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
  const all = Math.round(value);
  if (all < 3600) return `${Math.floor(all / 60)} min ${String(all % 60).padStart(2, "0")} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  const hours = Math.round(value / 3600);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(value) {
  for (const [name, unit] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= unit) return `${digits(value / unit)} ${name}`;
  }
  return `${value} B`;
}

const two = (value) => String(value).padStart(2, "0");

/** Hours, minutes and seconds of a moment, in this machine's time zone. */
export function clock(time, withSeconds = true) {
  const at = new Date(time * 1000);
  return `${two(at.getHours())}:${two(at.getMinutes())}${withSeconds ? `:${two(at.getSeconds())}` : ""}`;
}

export function day(time) {
  const at = new Date(time * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
}

/** [[0, 3], [5, 5]] as "0–3, 5". */
export const intervals = (runs) => runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");

export const list = (numbers) => (numbers.length ? numbers.join(", ") : "–");
