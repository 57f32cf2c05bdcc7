// What passes from rank to rank, and the bars of every rank.

function heat(bytes, low, high) {
  const share = high > low ? Math.log(bytes / low) / Math.log(high / low) : 0.6;
  return `color-mix(in oklab, var(--heat-high) ${(6 + 94 * share).toFixed(1)}%, var(--heat-low))`;
}

function drawMatrix() {
  const figure = byId("matrix"), count = data.bins.length, left = 46, top = 34;
  figure.replaceChildren();
  const room = Math.min(figure.clientWidth - left - 2, 460, 72 * count), step = room / count;
  const [svg] = canvas(figure, top + room + 44);
  const gap = step > 10 ? 1.5 : step > 5 ? 0.5 : 0;
  make("rect", { x: left, y: top, width: room - gap, height: room - gap, fill: "var(--empty)" }, svg);
  const crossing = data.matrix.map((cell) => cell[2]).filter(Boolean);
  // Nearly equal amounts shall look nearly equal.
  const high = Math.max(...crossing), least = Math.min(...crossing);
  const low = least === high ? high : Math.min(least, high / 8);
  for (const [from, to, crosses, stays] of data.matrix) {
    const fill = crosses ? heat(crosses, low, high) : "var(--stay)";
    const place = { x: left + to * step, y: top + from * step, width: step - gap, height: step - gap };
    tips.set(make("rect", { ...place, fill, class: "hit" }, svg), () => [
      `${ranks(data.bins[from])} → ${ranks(data.bins[to])}`,
      ...(crosses ? [`${size(crosses)} cross`] : []),
      ...(stays ? [`${size(stays)} stay on the rank that reads them`] : []),
    ]);
  }
  drawAxes(svg, left, top, step, gap);
  drawScale(svg, left, top + room + 14, { low, least, high });
}

function drawAxes(svg, left, top, step, gap) {
  make("text", { x: left, y: 11 }, svg, "to the rank that writes →");
  make("text", { x: 10, y: top, transform: `rotate(-90 10 ${top})`, "text-anchor": "end" }, svg,
    "← from the rank that reads");
  const every = 2 ** Math.max(0, Math.ceil(Math.log2(30 / step)));
  const natural = data.order.every((place, rank) => place === rank);
  data.bins.forEach(([first, last], place) => {
    const plain = first !== last && !natural;
    const mark = { fill: plain ? "var(--stay)" : colour(first) };
    make("rect", { ...mark, x: left - 6, y: top + place * step, width: 4, height: step - gap }, svg);
    make("rect", { ...mark, x: left + place * step, y: top - 6, width: step - gap, height: 4 }, svg);
    if (place % every) return;
    const centre = every > 1 ? Math.min(step / 2, 8) : step / 2;
    make("text", { x: left + place * step + (every > 1 ? 0 : centre), y: top - 9,
      "text-anchor": every > 1 ? "start" : "middle" }, svg, first);
    make("text", { x: left - 9, y: top + place * step + centre + 4, "text-anchor": "end" }, svg, first);
  });
}

function drawScale(svg, left, y, { low, least, high }) {
  make("rect", { x: left, y, width: 12, height: 12, fill: "var(--stay)" }, svg);
  make("text", { x: left + 17, y: y + 10 }, svg, "stays");
  if (!(high > 0)) return;
  let x = left + 70;
  for (let part = 0; part < 20 && high > low; part++) {
    const fill = heat(least * (high / least) ** (part / 19), low, high);
    make("rect", { x: x + part * 5, y, width: 5.2, height: 12, fill }, svg);
  }
  if (high === low) make("rect", { x, y, width: 12, height: 12, fill: heat(1, 1, 1) }, svg);
  x += high > low ? 106 : 18;
  make("text", { x, y: y + 10 }, svg,
    high > low ? `${size(least)} to ${size(high)} cross` : `${size(high)} cross`);
}

// Bars.

function spread(values, text) {
  const low = Math.min(...values), high = Math.max(...values);
  const same = text(low) === text(high);
  if (same) return data.world > 1 ? `${text(high)} each` : text(high);
  return `${text(low)} to ${text(high)}`;
}

function drawPanel(name, values, most, text, lines, wide) {
  const panel = document.createElement("div"), title = document.createElement("h3");
  const remark = document.createElement("span");
  panel.className = wide ? "panel wide" : "panel";
  title.textContent = name;
  remark.textContent = spread(values, text);
  title.append(remark);
  panel.append(title);
  byId("loads").append(panel);
  const height = 104, [svg, width] = canvas(panel, height + 14), scale = most ? height / most : 0;
  make("rect", { x: 0, y: 0, width, height, fill: "var(--empty)" }, svg);
  if (values.length <= FEW_RANKS) drawBars(svg, width, height, values, scale, name, text);
  else drawSorted(svg, width, height, values, scale, name, text);
  for (const [value, label] of lines) {
    const y = height - value * scale;
    make("line", { x1: 0, x2: width, y1: y, y2: y, stroke: "var(--warn)", "stroke-dasharray": "5 4" }, svg);
    make("text", { x: width - 4, y: y + 13, "text-anchor": "end" }, svg, label);
  }
}

function drawBars(svg, width, height, values, scale, name, text) {
  const step = width / values.length, gap = step > 6 ? Math.min(6, step * 0.16) : 0.5;
  const every = 2 ** Math.max(0, Math.ceil(Math.log2(22 / step)));
  values.forEach((value, rank) => {
    const x = rank * step + gap / 2, tall = value * scale;
    make("rect", { x, y: height - tall, width: step - gap, height: tall, fill: colour(rank) }, svg);
    const hit = make("rect", { x, y: 0, width: step - gap, height, fill: "transparent", class: "hit" }, svg);
    tips.set(hit, () => [`rank ${rank}`, `${name} ${text(value)}`]);
    if (rank % every === 0) {
      make("text", { x: x + (step - gap) / 2, y: height + 12, "text-anchor": "middle" }, svg, rank);
    }
  });
}

// So many ranks are sorted, the fullest first: then their balance shows.
function drawSorted(svg, width, height, values, scale, name, text) {
  const sorted = values.map((value, rank) => [value, rank]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const step = width / sorted.length;
  const path = sorted.map(([value], place) =>
    `L${(place * step).toFixed(1)} ${(height - value * scale).toFixed(1)}H${((place + 1) * step).toFixed(1)}`);
  make("path", { d: `M0 ${height}${path.join("")}V${height}Z`, fill: "var(--accent)", opacity: 0.7 }, svg);
  const hit = make("rect", { x: 0, y: 0, width, height, fill: "transparent" }, svg);
  tips.set(hit, (event) => {
    const box = hit.getBoundingClientRect(), along = (event.clientX - box.left) / box.width;
    const place = Math.min(sorted.length - 1, Math.max(0, Math.floor(along * sorted.length)));
    const [value, rank] = sorted[place];
    return [`rank ${rank}`, `${name} ${text(value)}`, `place ${number(place + 1)} of ${number(sorted.length)}`];
  });
  make("text", { x: 0, y: height + 12 }, svg, "fullest rank");
  make("text", { x: width, y: height + 12, "text-anchor": "end" }, svg, "emptiest");
}

function drawLoads() {
  byId("loads").replaceChildren();
  const most = Math.max(...Object.values(data.loads).flat());
  for (const name of ["read", "written", "sent", "received"]) {
    drawPanel(name, data.loads[name], most, size, [], false);
  }
  const { limit, used, measured } = data.memory, mib = (bytes) => `${number(Math.round(bytes / 1048576))} MiB`;
  drawPanel(measured ? "memory at its peak" : "memory planned", used, Math.max(limit, ...used) * 1.06, mib,
    [[limit, `engine.memory ${mib(limit)}`]], true);
}
