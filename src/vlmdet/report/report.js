// Filters and sorts the cards of each gallery; the page is readable without it.
"use strict";
for (const gallery of document.querySelectorAll(".gallery")) {
  const form = gallery.querySelector("form");
  const grid = gallery.querySelector(".cards");
  const status = gallery.querySelector("[role=status]");
  const cards = [...grid.children].map((node) => ({
    node,
    number: Number(node.dataset.number),
    labels: node.dataset.labels,
    text: node.textContent.toLowerCase(),
    panels: new Map([...node.querySelectorAll(".panel")].map((panel) => [panel.dataset.model, {
      kinds: panel.dataset.kinds,
      f1: panel.dataset.f1 === "" ? null : Number(panel.dataset.f1),
      iou: panel.dataset.iou === "" ? null : Number(panel.dataset.iou),
    }])),
  }));
  const has = (card, model, kind) => {
    const panel = card.panels.get(model);
    return kind === "all" || (panel !== undefined && panel.kinds.includes(` ${kind} `));
  };
  // undefined figures stand last, whichever way the others are sorted
  const compare = (a, b, sign) => a === b ? 0 : a === null ? 1 : b === null ? -1 : sign * (a - b);
  const value = (card, model, key) => {
    const panel = card.panels.get(model);
    return panel === undefined ? null : panel[key];
  };
  const gain = (card, model) => {
    const own = value(card, model, "iou"), base = value(card, "base", "iou");
    return own === null || base === null ? null : own - base;
  };
  const broken = (card, model) => has(card, model, "error") ? 0 : 1;
  const orders = {
    worst: (model) => (a, b) => broken(a, model) - broken(b, model) ||
      compare(value(a, model, "f1"), value(b, model, "f1"), 1) ||
      compare(value(a, model, "iou"), value(b, model, "iou"), 1),
    best: (model) => (a, b) => compare(value(a, model, "f1"), value(b, model, "f1"), -1) ||
      compare(value(a, model, "iou"), value(b, model, "iou"), -1),
    gained: (model) => (a, b) => compare(gain(a, model), gain(b, model), -1),
    lost: (model) => (a, b) => compare(gain(a, model), gain(b, model), 1),
    file: () => () => 0,
  };
  const update = () => {
    const chosen = new FormData(form);
    const model = chosen.get("model"), kind = chosen.get("kind"), label = chosen.get("label") || "";
    const words = (chosen.get("words") || "").trim().toLowerCase();
    const fits = cards.filter((card) => (label === "" || card.labels.includes(` ${label} `)) &&
      (words === "" || card.text.includes(words)));
    for (const input of form.querySelectorAll("[name=kind]")) {
      const count = fits.filter((card) => has(card, model, input.value)).length;
      input.nextElementSibling.querySelector("b").textContent = count;
      input.nextElementSibling.classList.toggle("none", count === 0);
    }
    const shown = new Set(fits.filter((card) => has(card, model, kind)));
    const order = orders[chosen.get("order")](model);
    const sorted = [...cards].sort((a, b) => order(a, b) || a.number - b.number);
    const nodes = [...grid.children];
    if (sorted.some((card, i) => card.node !== nodes[i])) grid.replaceChildren(...sorted.map((card) => card.node));
    for (const card of cards) card.node.hidden = !shown.has(card);
    status.textContent = `${shown.size} of ${cards.length} pictures are shown`;
  };
  // a box under the pointer tells what the list beneath says of it; written on demand, since it doubles the page
  grid.addEventListener("pointerover", (event) => {
    const overlay = event.target.closest("svg.boxes");
    if (overlay === null || overlay.querySelector("title") !== null) return;
    const lines = overlay.closest(".panel").querySelectorAll("ol > li");
    overlay.querySelectorAll("path:not(.case)").forEach((path, i) => {
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = lines[i].textContent;
      path.append(title);
    });
  });
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  update();
}
