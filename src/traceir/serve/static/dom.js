// Elements, made so that text from data can only ever become text, and messages to the reader. The review page uses these too.

export const find = (id) => document.getElementById(id);
export const onClick = (id, act) => find(id).addEventListener("click", act);

// A new element. Attributes: `text`, `on` (listeners by name), and any other by its name; false, null and
// undefined leave one out. Children that are strings become text nodes.
export function el(tag, { text, on = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = String(text);
  for (const [kind, what] of Object.entries(on)) made.addEventListener(kind, what);
  for (const [name, value] of Object.entries(attributes)) {
    if (isGiven(value)) made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter(isGiven));
  return made;
}

const isGiven = (value) => value !== null && value !== undefined && value !== false;

export function icon(name) {
  const svg = document.querySelector("svg.icon").cloneNode(true);
  svg.firstElementChild.setAttribute("href", `#i-${name}`);
  return svg;
}

// `face`: a text, an element, or several.
export const button = (face, onclick, attributes = {}) => el("button", { type: "button", ...attributes, on: { click: onclick } }, ...[face].flat());

// Sets text only where it changed, so that selections and screen readers are left in peace.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A text in its element, which is hidden where there is none.
export function tell(element, text) {
  element.hidden = !text;
  say(element, text || "");
}

const pending = [];

// Tells screen readers. What comes within a moment is told together, or the last would drown the rest; the same words twice are told twice.
export function announce(text) {
  if (!text) return;
  if (pending.push(text) > 1) return;
  setTimeout(() => {
    const all = pending.splice(0).join(" ");
    find("live").textContent = find("live").textContent === all ? `${all} ` : all;
  }, 120);
}

let toastEnds = 0;

// A short message that goes away by itself, told to screen readers too.
export function toast(text) {
  announce(text);
  tell(find("toast"), text);
  clearTimeout(toastEnds);
  toastEnds = setTimeout(() => tell(find("toast"), ""), 4000);
}

// Opens a modal dialog; a click beside it and every [data-close] in it close it. Focus goes back by itself.
export function openDialog(dialog) {
  dialog.onclick = (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  };
  if (!dialog.open) dialog.showModal();
}

export const isTyping = (target) => target instanceof HTMLElement &&
  (target.isContentEditable || target.matches("textarea, select, input:not([type=radio], [type=checkbox], [type=file], [type=button])"));

// A number with fixed digits, or a dash where there is none.
export const fixed = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

export function seconds(value) {
  if (!Number.isFinite(value)) return "";
  if (value < 1) return value < 0.0005 ? "<1 ms" : `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
export const sayRate = (rate) => `1 in ${Math.round(1 / rate)}`;
