// Captions, hover and theme.

function writeCaptions() {
  const colours = data.world > 1 ? ", coloured by the rank that reads (left) or writes them (right)" : "";
  byId("layouts-caption").textContent =
    `Columns are files, rows parameters${colours}. Small rows are drawn larger.`;
  const each = data.bins[0][1] - data.bins[0][0] + 1;
  const binned = each > 1 ? ` A cell stands for ${each} by ${each} ranks.` : "";
  const none = data.direct ? "Direct exchange: every rank reads what it writes." : "Nothing crosses.";
  const any = data.matrix.some((cell) => cell[2]);
  byId("matrix-caption").textContent = (any ? "Bytes over the whole job, on a logarithmic scale." : none) + binned;
  byId("loads-caption").textContent = data.measured
    ? "Bytes as counted in the run, but those received, which are as planned. One scale for all four."
    : "Bytes over the whole job, one scale for all four.";
}

function showTip(event) {
  const tip = byId("tip"), lines = tips.get(event.target);
  tip.hidden = !lines;
  if (!lines) return;
  tip.replaceChildren(...lines(event).map((line) => {
    const row = document.createElement("div");
    row.textContent = line;
    return row;
  }));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}

function switchTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.style.colorScheme || (dark ? "dark" : "light");
  document.documentElement.style.colorScheme = now === "dark" ? "light" : "dark";
}

let drawn = 0;
function draw() {
  if (drawn === document.body.clientWidth) return;
  drawn = document.body.clientWidth;
  drawLayouts();
  drawMatrix();
  drawLoads();
}

writeCaptions();
drawLegend();
draw();
addEventListener("resize", draw);
document.addEventListener("pointermove", showTip);
byId("theme").addEventListener("click", switchTheme);
