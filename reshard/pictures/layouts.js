// The two layouts, side by side, and the colours of ranks.

function rowsOf() {
  const few = data.bands.length <= 40, rows = [];
  const total = data.bands.reduce((sum, band) => sum + band.needed, 0) || 1;
  const least = few ? 15 : Math.max(6, Math.min(12, 640 / data.bands.length));
  let y = 62, group = "";
  for (const band of data.bands) {
    if (band.group !== group) y += band.group ? 22 : 8;
    const height = least + (few ? 300 : 60) * band.needed / total;
    rows.push({ band, y, height, opens: band.group !== group && band.group });
    y += height + (few ? 2 : 1);
    group = band.group;
  }
  return [rows, y];
}

function drawSide(svg, side, rows, left, width, verb) {
  const count = side.columns.length, step = width / count, gap = step > 12 ? 2 : step > 4 ? 0.5 : 0;
  const units = side.unit === "shard" ? `, ${number(side.units)} shards` : "";
  make("text", { x: left, y: 14, class: "strong" }, svg,
    shortened(`${side.name}: ${number(side.count)} file${side.count === 1 ? "" : "s"}${units}`, width * 0.8));
  const names = ends([side.columns[0][1][0], side.columns[count - 1][1].at(-1)].slice(0, side.count));
  make("text", { x: left, y: 30 }, svg, shortened(names, width));
  const longest = Math.max(...side.columns.map((column) => column[0].length)) * 6.5 + 6;
  const every = Math.ceil(longest / step), word = step > 64 ? `${side.unit} ` : "";
  side.columns.forEach(([label], place) => {
    if (place % every) return;
    const anchor = every > 1 ? "start" : "middle";
    const x = left + place * step + (every > 1 ? 0 : step / 2);
    if (every > 1 && place && x + label.length * 6.5 > left + width) return;
    tips.set(make("text", { x, y: 52, "text-anchor": anchor }, svg, word + label), () => columnTip(side, place));
  });
  for (const { y, height } of rows) {
    make("rect", { x: left, y, width: width - gap, height, fill: "var(--empty)" }, svg);
  }
  for (const [band, column, bytes, share, files, region] of side.cells) {
    const { y, height } = rows[band], [text, stripes] = data.shares[share];
    const room = step - gap, cell = { x: left + column * step, y, width: room, height };
    drawStripes(svg, cell, stripes);
    const hit = make("rect", { ...cell, fill: "transparent", class: "hit" }, svg);
    const { names, count } = data.bands[band];
    tips.set(hit, () => [
      ends(names) + (count > 1 ? ` (${number(count)} parameters)` : ""),
      ends(side.files[files]),
      ...(side.regions[region] ? [side.regions[region]] : []),
      `${size(bytes)}, ${verb} by ${text}`,
    ]);
  }
}

function columnTip(side, place) {
  const [label, files, many] = side.columns[place];
  const bytes = side.cells.reduce((sum, cell) => sum + (cell[1] === place ? cell[2] : 0), 0);
  return [`${side.unit} ${label}`, ends(files) + (many > 1 ? ` (${number(many)} files)` : ""), size(bytes)];
}

function drawStripes(svg, { x, y, width, height }, stripes) {
  const most = Math.max(1, Math.floor(width / 2));
  const every = Math.ceil(stripes.length / most);
  const shown = stripes.filter((_, place) => place % every === 0);
  const total = shown.reduce((sum, stripe) => sum + stripe[1], 0) || 1;
  const end = x + width;
  for (const [rank, share] of shown) {
    const part = width * share / total;
    // Each reaches to the end of the cell, below those that follow: no seam shines through.
    make("rect", { x, y, width: end - x, height, fill: colour(rank) }, svg);
    if (data.world > 1 && data.world <= FEW_RANKS && height >= 15 && part >= 7 * String(rank).length + 8) {
      make("text", { x: x + part / 2, y: y + height / 2 + 3.5, "text-anchor": "middle", class: "on" },
        svg, rank);
    }
    x += part;
  }
}

function drawLayouts() {
  const figure = byId("layouts");
  figure.replaceChildren();
  const [rows, height] = rowsOf();
  const [svg, width] = canvas(figure, height + 4);
  const middle = width < 700 ? 150 : 236, side = (width - middle) / 2;
  drawSide(svg, data.source, rows, 0, side, "read");
  drawSide(svg, data.target, rows, side + middle, side, "written");
  drawMiddle(svg, rows, side + 12, middle - 26);
}

function drawMiddle(svg, rows, left, width) {
  const bar = width < 150 ? 34 : 56, from = left + width - bar;
  const any = data.bands.some((band) => band.crossing);
  if (any) make("text", { x: left + width, y: 52, "text-anchor": "end" }, svg, "crosses");
  let free = 0;
  for (const { band, y, height, opens } of rows) {
    if (opens) {
      make("text", { x: left, y: y - 6, class: "strong" }, svg, opens);
      free = y;
    }
    const middle = y + height / 2 + 4;
    if (middle - 10 >= free) {
      const room = width - bar - 4, last = band.label.split(".").at(-1);
      const label = shortened(band.label.length * 6.1 > room && !band.label.includes(" ") ? last : band.label, room);
      tips.set(make("text", { x: left, y: middle, class: "name" }, svg, label), () => bandTip(band));
      free = middle + 2;
    }
    if (any) drawCrossing(svg, band, { x: from, y, width: bar, height });
  }
}

function bandTip(band) {
  return [
    ends(band.names) + (band.count > 1 ? ` (${number(band.count)} parameters)` : ""),
    `${size(band.crossing)} of ${size(band.needed)} cross the network`,
  ];
}

function drawCrossing(svg, band, { x, y, width, height }) {
  const share = band.needed ? band.crossing / band.needed : 0;
  const thick = Math.min(height, 13), top = y + (height - thick) / 2;
  make("rect", { x, y: top, width, height: thick, fill: "var(--empty)" }, svg);
  make("rect", { x, y: top, width: width * share, height: thick, fill: "var(--accent)", opacity: 0.45 }, svg);
  if (thick > 10) {
    const style = share ? "name" : "";
    make("text", { x: x + width - 3, y: top + 10, "text-anchor": "end", class: style }, svg, percent(share));
  }
  tips.set(make("rect", { x, y: top, width, height: thick, fill: "transparent", class: "hit" }, svg),
    () => bandTip(band));
}

// Ranks and their colours.

function drawLegend() {
  const legend = byId("legend"), colours = [];
  const word = (text) => legend.append(text);
  word("rank ");
  if (data.world <= 32) {
    for (let rank = 0; rank < data.world; rank++) {
      const chip = document.createElement("b");
      chip.textContent = rank;
      chip.style.background = colour(rank);
      legend.append(chip);
    }
    return;
  }
  const ordered = data.order.map((place, rank) => [place, rank]).sort((a, b) => a[0] - b[0]);
  for (let part = 0; part <= 24; part++) {
    colours.push(colour(ordered[Math.round((data.world - 1) * part / 24)][1]));
  }
  const ramp = document.createElement("i");
  ramp.style.background = `linear-gradient(90deg, ${colours.join(", ")})`;
  word(`${ordered[0][1]} `);
  legend.append(ramp);
  word(` ${number(ordered.at(-1)[1])}`);
  const natural = ordered.every(([place, rank]) => place === rank);
  word(natural ? "" : ", ranks that read the same files side by side");
}
