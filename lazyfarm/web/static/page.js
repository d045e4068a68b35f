// What htmx leaves to be done: say so when the page's process is gone, and let "/" find the filter.
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

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea");
  const filter = document.querySelector("#filter input");
  if (event.key === "/" && filter && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    filter.focus();
    filter.select();
  }
});
