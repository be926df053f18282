// Draws the curves, the map of idle time and the plans from the JSON in this page.
// Text from files only ever becomes text nodes.
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const NS = "http://www.w3.org/2000/svg";

  function svg(name, attributes, parent, text) {
    const node = document.createElementNS(NS, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }
  function html(name, className, parent, text) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }
  function show(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    const x = event.clientX + 14 + w > window.innerWidth ? event.clientX - w - 14 : event.clientX + 14;
    const y = Math.min(event.clientY + 14, window.innerHeight - h - 8);
    tip.style.left = Math.max(4, x) + "px";
    tip.style.top = Math.max(4, y) + "px";
  }
  function hide() { tip.hidden = true; }

  // ---- numbers ----
  function ticks(low, high, count) {
    const raw = (high - low) / count, size = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map(m => m * size).find(s => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }
  function short(v) {
    const a = Math.abs(v);
    if (a === 0) return "0";
    if (a >= 1e9) return +(v / 1e9).toPrecision(4) + "G";
    if (a >= 1e6) return +(v / 1e6).toPrecision(4) + "M";
    if (a >= 1e4) return +(v / 1e3).toPrecision(4) + "K";
    if (a < 1e-3) return v.toExponential(1).replace(".0e", "e");
    return String(+v.toPrecision(4));
  }
  function exact(v) {
    const a = Math.abs(v);
    if (Number.isInteger(v)) return v.toLocaleString("en-US");
    if (a !== 0 && (a < 1e-3 || a >= 1e7)) return v.toExponential(3);
    return a >= 1000 ? Math.round(v).toLocaleString("en-US") : String(+v.toPrecision(5));
  }
  function seconds(s) {
    if (s >= 1) return s.toFixed(3) + " s";
    return s >= 1e-3 ? (s * 1e3).toFixed(2) + " ms" : (s * 1e6).toFixed(1) + " us";
  }
  function percent(share) { return (100 * share).toFixed(1) + " %"; }
  function ranges(numbers) {
    const sorted = numbers.slice().sort((a, b) => a - b), parts = [];
    for (let i = 0, j; i < sorted.length; i = j) {
      for (j = i + 1; j < sorted.length && sorted[j] === sorted[j - 1] + 1; j++);
      parts.push(j - i > 2 ? sorted[i] + "-" + sorted[j - 1] : sorted.slice(i, j).join(", "));
    }
    return parts.slice(0, 12).join(", ") + (parts.length > 12 ? ", ..." : "");
  }

  // ---- curves ----
  function drawChart(figure, spec) {
    figure.textContent = "";
    html("h2", "", figure, spec.title + (spec.unit ? "," + spec.unit : "") + (spec.log ? ", log scale" : ""));
    if (spec.note) html("p", "", figure, spec.note);
    if (spec.series.length > 1) {
      const legend = html("div", "legend", figure);
      spec.series.forEach((s, i) => {
        const entry = html("span", "", legend);
        html("i", "stroke", entry).style.background = "var(--c" + i + ")";
        entry.appendChild(document.createTextNode(s.name));
      });
    }
    const W = Math.max(260, figure.clientWidth - 36), H = 190;
    const L = 48, R = 10, T = 8, B = 22;
    const root = svg("svg", { height: H, viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": spec.title }, figure);
    const at = spec.log ? Math.log10 : v => v;
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (const s of spec.series) {
      x0 = Math.min(x0, s.x[0]); x1 = Math.max(x1, s.x[s.x.length - 1]);
      for (const v of s.low || s.y) y0 = Math.min(y0, at(v));
      for (const v of s.high || s.y) y1 = Math.max(y1, at(v));
    }
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    // From zero where values are of one size; not for a loss that barely moves.
    if (!spec.log && y0 >= 0 && y0 < 0.6 * y1) y0 = 0;
    if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 1; y0 -= pad; y1 += pad; }
    const pad = (y1 - y0) * 0.05; y1 += pad; if (y0 !== 0 || spec.log) y0 -= pad;
    const X = v => L + (v - x0) / (x1 - x0) * (W - L - R);
    const Y = v => H - B - (at(v) - y0) / (y1 - y0) * (H - T - B);
    let yt = ticks(y0, y1, 5);
    if (spec.log) {
      const whole = [];
      for (let e = Math.ceil(y0); e <= y1; e++) whole.push(e);
      yt = (whole.length > 1 ? whole : yt).map(e => Math.pow(10, e));
    }
    for (const v of yt) {
      svg("line", { class: "grid", x1: L, x2: W - R, y1: Y(v), y2: Y(v) }, root);
      svg("text", { x: L - 6, y: Y(v) + 4, "text-anchor": "end" }, root, short(v));
    }
    for (const v of ticks(x0, x1, Math.max(2, Math.min(7, W / 80)))) {
      if (!Number.isInteger(v)) continue;
      svg("text", { x: X(v), y: H - 6, "text-anchor": "middle" }, root, short(v));
    }
    spec.series.forEach((s, i) => {
      const color = "var(--c" + i + ")";
      const line = s.x.map((x, k) => X(x).toFixed(1) + "," + Y(s.y[k]).toFixed(1));
      if (s.low) {
        const up = s.x.map((x, k) => X(x).toFixed(1) + "," + Y(s.high[k]).toFixed(1));
        const down = s.x.map((x, k) => X(x).toFixed(1) + "," + Y(s.low[k]).toFixed(1)).reverse();
        svg("polygon", { class: "band", points: up.concat(down).join(" "), style: "stroke-width:1;fill:" + color + ";stroke:" + color }, root);
      }
      svg("polyline", { class: "curve", points: line.join(" "), style: "stroke:" + color }, root);
      if (s.x.length <= 40) s.x.forEach((x, k) =>
        svg("circle", { cx: X(x), cy: Y(s.y[k]), r: s.x.length === 1 ? 4 : 2.4, style: "fill:" + color }, root));
    });
    const cross = svg("line", { class: "cross", y1: T, y2: H - B, visibility: "hidden" }, root);
    const area = svg("rect", { x: L, y: 0, width: W - L - R, height: H - B, fill: "transparent", class: "area" }, root);
    area.addEventListener("mousemove", event => {
      const box = area.getBoundingClientRect();
      const x = x0 + (event.clientX - box.left) / box.width * (x1 - x0);
      const near = spec.series.map(s => nearest(s.x, x));
      const at0 = spec.series[0].x[near[0]];
      cross.setAttribute("x1", X(at0)); cross.setAttribute("x2", X(at0));
      cross.setAttribute("visibility", "visible");
      show(event, ["step " + exact(at0)].concat(spec.series.map((s, i) => {
        const k = near[i], other = s.x[k] === at0 ? "" : " (step " + exact(s.x[k]) + ")";
        const range = s.low && s.low[k] !== s.high[k] ? " (" + exact(s.low[k]) + " to " + exact(s.high[k]) + ")" : "";
        return s.name + ": " + exact(s.y[k]) + spec.unit + range + other;
      })).join("\n"));
    });
    area.addEventListener("mouseleave", () => { hide(); cross.setAttribute("visibility", "hidden"); });
  }
  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle + 1; else high = middle;
    }
    return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
  }

  // ---- idle per rank ----
  function drawIdle(parent, idle) {
    parent.textContent = "";
    const rows = idle.mean.length, columns = idle.share.length;
    const most = Math.max(0.05, ...idle.share.map(line => Math.max(...line)));
    const W = Math.max(300, parent.clientWidth), L = 62, R = 92, B = 24;
    const h = Math.max(7, Math.min(24, 480 / rows)), H = rows * h + B;
    const legend = html("div", "legend", parent);
    const scale = html("span", "", legend);
    const swatch = html("i", "", scale);
    swatch.style.width = "90px";
    swatch.style.background = "linear-gradient(90deg, transparent, var(--idle))";
    swatch.style.borderColor = "var(--line)";
    scale.appendChild(document.createTextNode("0 to " + percent(most)));
    const root = svg("svg", { height: H, viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": "Idle per rank" }, parent);
    const w = (W - L - R) / columns;
    const name = r => idle.block === 1 ? "rank " + r
      : "ranks " + r * idle.block + "-" + (Math.min((r + 1) * idle.block, idle.ranks) - 1);
    const every = Math.ceil(14 / h);
    for (let r = 0; r < rows; r++) {
      if (r % every === 0) svg("text", { x: L - 6, y: r * h + h / 2 + 4, "text-anchor": "end" }, root, name(r).replace(/^ranks? /, rows > 8 ? "" : "rank "));
      svg("rect", { class: "bar", x: W - R + 10, y: r * h + 1, height: Math.max(1, h - 2), width: idle.mean[r] / most * (R - 56) }, root);
      if (r % every === 0) svg("text", { x: W, y: r * h + h / 2 + 4, "text-anchor": "end" }, root, percent(idle.mean[r]));
    }
    for (let c = 0; c < columns; c++) for (let r = 0; r < rows; r++)
      svg("rect", { class: "cell", x: (L + c * w).toFixed(2), y: (r * h).toFixed(2), width: (w + 0.3).toFixed(2), height: (h - (h > 10 ? 1 : 0)).toFixed(2),
        "fill-opacity": (idle.share[c][r] / most).toFixed(3) }, root);
    svg("rect", { class: "frame", x: L, y: 0, width: W - L - R, height: rows * h }, root);
    const marks = Math.min(columns, Math.max(2, Math.floor((W - L - R) / 110)));
    for (let i = 0; i < marks; i++) {
      const c = marks === 1 ? 0 : Math.round(i * (columns - 1) / (marks - 1));
      svg("text", { x: L + (c + 0.5) * w, y: rows * h + 16, "text-anchor": "middle" }, root, "step " + exact(idle.last[c]));
    }
    const area = svg("rect", { class: "area", x: L, y: 0, width: W - L - R, height: rows * h, fill: "transparent" }, root);
    area.addEventListener("mousemove", event => {
      const box = area.getBoundingClientRect();
      const c = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
      const r = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
      const steps = idle.first[c] === idle.last[c] ? "step " + exact(idle.first[c])
        : "steps " + exact(idle.first[c]) + " to " + exact(idle.last[c]);
      show(event, name(r) + "\n" + steps + "\nidle " + percent(idle.share[c][r]) + " (mean of the run " + percent(idle.mean[r]) + ")");
    });
    area.addEventListener("mouseleave", hide);
  }

  // ---- plans ----
  const KIND = ["compute", "sending and receiving", "copies to the host", "waiting", "gradients and parameters"];
  function drawPlan(parent, plan) {
    parent.textContent = "";
    const legend = html("div", "legend", parent);
    const entries = [["a sequence (long ones in strong colors)", "background:" + (plan.colors[plan.long.indexOf(1)] || plan.colors[0] || "transparent")]];
    const present = new Set();
    plan.timelines.forEach(t => (t.kind || []).forEach(k => present.add(k)));
    [[1, "comm"], [2, "offload"], [3, "wait"], [4, "reduce"]].forEach(([k, name]) => {
      if (present.has(k)) entries.push([KIND[k], "background:var(--" + name + ");border-color:var(--waitline)"]);
    });
    for (const [text, style] of entries) {
      const entry = html("span", "", legend);
      html("i", "", entry).setAttribute("style", style);
      entry.appendChild(document.createTextNode(text));
    }
    const gathered = new Set(plan.gathered);
    const end = Math.max(...plan.timelines.map(t => t.end)) || 1;
    const roots = plan.timelines.map(t => drawTimeline(parent, plan, t, end, gathered));
    function light(seq) {
      for (const root of roots) {
        if (!root) continue;
        root.classList.toggle("dim", seq >= 0);
        root.querySelectorAll(".hit").forEach(node => node.classList.remove("hit"));
        if (seq >= 0) root.querySelectorAll("[data-seq='" + seq + "']").forEach(node => node.classList.add("hit"));
      }
    }
    let lit = -1;
    parent.onmousemove = event => {
      const box = event.target.closest ? event.target.closest(".box") : null;
      const seq = box ? +box.getAttribute("data-seq") : -1;
      if (seq !== lit) { light(seq); lit = seq; }
      if (box) show(event, box.about()); else hide();
    };
    parent.onmouseleave = () => { light(-1); lit = -1; hide(); };
  }
  function drawTimeline(parent, plan, t, end, gathered) {
    const head = html("div", "panel", parent, t.title + " ");
    html("span", "", head, seconds(t.end) + ", bubble " + percent(t.bubble));
    if (!t.row) {
      html("p", "", parent, t.count.toLocaleString("en-US") + " boxes are too many for a browser: open timeline_" + plan.step + ".json in https://ui.perfetto.dev.");
      return null;
    }
    const rows = plan.ranks * plan.stages, W = Math.max(300, parent.clientWidth), L = 62, R = 52, B = 22;
    const h = Math.max(5, Math.min(26, 620 / rows)), H = rows * h + B;
    const root = svg("svg", { height: H, viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": "Timeline, " + t.title }, parent);
    const X = s => L + s / end * (W - L - R);
    for (const s of ticks(0, end, Math.max(2, Math.min(8, W / 110)))) {
      svg("line", { class: "grid", x1: X(s), x2: X(s), y1: 0, y2: rows * h }, root);
      svg("text", { x: X(s), y: rows * h + 16, "text-anchor": "middle" }, root, end >= 1 ? +s.toPrecision(4) + " s" : +(s * 1e3).toPrecision(4) + " ms");
    }
    const every = Math.ceil(14 / h);
    for (let r = 0; r < rows; r++) {
      if (r % every) continue;
      const rank = r % plan.ranks, stage = Math.floor(r / plan.ranks);
      svg("text", { x: L - 6, y: r * h + h / 2 + 4, "text-anchor": "end" }, root,
        (rows > 8 ? "" : "rank ") + rank + (plan.stages > 1 ? " / " + stage : ""));
      if (t.idle[rank] !== undefined && stage === 0)
        svg("text", { x: W, y: r * h + h / 2 + 4, "text-anchor": "end" }, root, percent(t.idle[rank]));
    }
    for (let i = 0; i < t.row.length; i++) {
      const seq = t.seq[i], kind = t.kind[i];
      const box = svg("rect", { class: "box k" + kind + (seq >= 0 && !plan.long[seq] ? " short" : ""), "data-seq": seq,
        x: X(t.start[i]).toFixed(2), y: (t.row[i] * h).toFixed(2), width: Math.max(0.4, t.length[i] / end * (W - L - R)).toFixed(2),
        height: (h - (h > 8 ? 1.5 : 0.5)).toFixed(2) }, root);
      if (kind === 0) box.style.fill = seq >= 0 ? plan.colors[seq] : "var(--reduce)";
      box.about = () => about(plan, t, i, gathered);
    }
    return root;
  }
  function about(plan, t, i, gathered) {
    const seq = t.seq[i], rank = t.row[i] % plan.ranks, lines = [];
    if (seq >= 0) {
      const ring = plan.rings[seq];
      if (plan.names.length) lines.push(plan.names[seq]);
      lines.push("sequence id " + plan.ids[seq] + " (number " + seq + " of the step)");
      lines.push(plan.lengths[seq].toLocaleString("en-US") + " tokens");
      lines.push(ring.length > 1 ? (gathered.has(seq) ? "gathered on " : "ring of ") + ring.length + ": ranks " + ranges(ring) : "on rank " + rank + " alone (degree 1)");
      if (t.microbatch[i] >= 0) lines.push("microbatch " + t.microbatch[i] + " of rank " + rank);
    } else lines.push("rank " + rank);
    lines.push((KIND[t.kind[i]] || "") + ": " + seconds(t.start[i]) + " to " + seconds(t.start[i] + t.length[i]) + " (" + seconds(t.length[i]) + ")");
    return lines.join("\n");
  }

  // ---- all of it, again when the width changes ----
  let width = 0;
  function draw() {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    document.querySelectorAll("[data-chart]").forEach(node => drawChart(node, data.charts[+node.dataset.chart]));
    if (data.idle) drawIdle(document.getElementById("idle"), data.idle);
    document.querySelectorAll("[data-plan]").forEach(node => drawPlan(node, data.plans[+node.dataset.plan]));
  }
  let timer = 0;
  window.addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(draw, 120); });
  draw();
})();
