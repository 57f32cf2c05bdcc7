"use strict";
// Draws what Python has counted: nothing is computed here but places, colours and words.
const data = JSON.parse(document.getElementById("record").textContent);
const FEW_RANKS = 64;
const tips = new WeakMap();
const SVG = Object.assign(document.createElement("p"), { innerHTML: "<svg>" }).firstChild.namespaceURI;
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");

function size(bytes) {
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (bytes < 999.5) return `${Number(bytes.toPrecision(3))} ${unit}`;
    bytes /= 1000;
  }
  return `${Number(bytes.toPrecision(3))} TB`;
}

function make(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function canvas(figure, height) {
  const width = Math.max(200, figure.clientWidth);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height }, figure);
  svg.setAttribute("aria-hidden", "true");
  return [svg, width];
}

// Ranks that read the same files have neighbouring hues.
function colour(rank) {
  const place = data.order[rank], few = data.world <= 12;
  const hue = 250 + (few ? 360 : 300) * place / data.world;
  const light = data.world <= 16 && place % 2 ? 0.78 : 0.7;
  return `oklch(${light} 0.125 ${(hue % 360).toFixed(1)})`;
}

const percent = (share) => share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`;
const shortened = (text, width) => {
  const room = Math.max(4, Math.floor(width / 6.1));
  return text.length <= room ? text : text.slice(0, room / 2) + "…" + text.slice(-(room / 2 - 1));
};
const ends = (names) => names.length < 2 ? String(names) : `${names[0]} … ${names[1]}`;
const ranks = ([first, last]) => first === last ? `rank ${first}` : `ranks ${first} to ${last}`;
