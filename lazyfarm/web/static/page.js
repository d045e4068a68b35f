// What htmx leaves to be done: say so when the page's process is gone, let "/" find the filter, and let who looks on stay
// where they are while the page changes under them.
"use strict";

const gone = () => document.getElementById("gone");

function show(isGone) {
  if (gone()) gone().hidden = !isGone;
}

for (const name of ["htmx:sendError", "htmx:responseError", "htmx:sseError"]) {
  document.addEventListener(name, () => show(true));
}
for (const name of ["htmx:afterOnLoad", "htmx:sseOpen", "htmx:sseClose"]) {
  document.addEventListener(name, () => show(false));
}

// The clocks of what is busy go on by themselves; what is told of them next puts them right.
const seen = new WeakMap();
setInterval(() => {
  for (const clock of document.querySelectorAll("[data-busy]")) {
    if (!seen.has(clock)) seen.set(clock, performance.now());
    const busy = Number(clock.dataset.busy) + (performance.now() - seen.get(clock)) / 1000;
    clock.textContent = `${busy.toFixed(1)} s`;
  }
}, 1000);

// What has the focus and no ID of its own, which htmx looks after, is found anew by where it leads. What was moved aside
// in a box of its own stays so.
let focused = null;
let aside = [];
const alike = (link) => [...document.querySelectorAll("#live a")].filter((one) => one.getAttribute("href") === link);

function remember() {
  const link = document.activeElement?.closest("#live a:not([id])");
  focused = link && { link: link.getAttribute("href"), place: alike(link.getAttribute("href")).indexOf(link) };
  aside = [...document.querySelectorAll("#live .scroll")].map((box) => box.scrollLeft);
}

function restore() {
  document.querySelectorAll("#live .scroll").forEach((box, place) => { box.scrollLeft = aside[place] ?? 0; });
  if (focused && document.activeElement === document.body) {
    const found = alike(focused.link);
    (found[focused.place] ?? found[0] ?? document.getElementById("live")).focus({ preventScroll: true });
  }
}

// What is said aloud: what is wrong and how a job stands, when that changes, and what a filter has found; not each figure.
const told = (part) => part.dataset.say || part.textContent.trim().replace(/\s+/g, " ");
const words = (parts) => [...document.querySelectorAll(parts)].map(told).join(". ");
let state = words("[data-say]"); // which is read with the page

function say(isFound) {
  const now = words("[data-say]");
  if (isFound) document.getElementById("said").textContent = words("#live nav.paging:not(.again) > span, #live p.paging");
  else if (now !== state) document.getElementById("said").textContent = now;
  state = now;
}

for (const name of ["htmx:beforeSwap", "htmx:sseBeforeMessage"]) document.addEventListener(name, remember);
document.addEventListener("htmx:afterSwap", (event) => {
  restore();
  say(event.detail.requestConfig?.elt.id === "filter");
});
document.addEventListener("htmx:sseMessage", () => {
  restore();
  say(false);
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea");
  const filter = document.querySelector("#filter input");
  if (event.key === "/" && filter && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    filter.focus();
    filter.select();
  }
});
