// <dora-chart data='{...}'>: a line chart that the server describes and this draws.
//
// {x: [from, to], name, unit, log, series: [{name, kind, color, points: [[x, y], ...]}],
//  marks: [{x, name}]}; kind is "raw" (thin), "line" or "dots" (a line with points).
// Few enough points come from the server that a new drawing takes less than a frame.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const EDGE = { left: 52, right: 12, top: 10, bottom: 26 };
  const STYLE = `
    :host { display: block; position: relative; height: 300px; touch-action: pan-y; }
    svg { display: block; overflow: visible; font: 11.5px "IBM Plex Sans", system-ui, sans-serif; }
    text { fill: var(--muted); font-variant-numeric: tabular-nums; }
    .grid { stroke: var(--line); }
    .mark { stroke: var(--line-strong); stroke-dasharray: 1 3; }
    .mark.best { stroke: var(--series-2); stroke-dasharray: 4 3; }
    path { fill: none; stroke-width: 2; stroke-linejoin: round; }
    path.raw { stroke-width: 1; }
    .cursor line { stroke: var(--faint); stroke-dasharray: 2 2; }
    .tip {
      position: absolute; top: 8px; z-index: 2; pointer-events: none; display: grid; gap: 3px;
      padding: 7px 10px; border: 1px solid var(--line-strong); border-radius: 8px;
      background: var(--card); color: var(--ink); font-size: 12px; line-height: 1.35;
      white-space: nowrap; font-variant-numeric: tabular-nums; box-shadow: 0 4px 14px #00000018;
    }
    .tip i { display: inline-block; width: 8px; height: 8px; margin-right: 6px; border-radius: 50%; }`;

  function make(name, attributes, parent, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  // Round numbers between two values, about as many as asked for.
  function ticks(low, high, wanted) {
    const rough = (high - low) / Math.max(1, wanted);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
    return found;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("e-0", "e-");
    return String(+value.toPrecision(4));
  }

  class Chart extends HTMLElement {
    static observedAttributes = ["data"];

    constructor() {
      super();
      // What is inside a shadow stays when Gradio compares the element with its new HTML.
      const root = this.attachShadow({ mode: "open" });
      const style = document.createElement("style");
      style.textContent = STYLE;
      this.picture = document.createElement("div");
      root.append(style, this.picture);
      this.observer = new ResizeObserver(() => this.draw());
      this.addEventListener("pointermove", (event) => {
        this.hover(event.clientX - this.getBoundingClientRect().left);
      });
      this.addEventListener("pointerleave", () => this.hover(null));
    }

    connectedCallback() {
      this.observer.observe(this);
    }

    disconnectedCallback() {
      this.observer.disconnect();
    }

    attributeChangedCallback(_name, before, now) {
      if (before === now) return;
      this.chart = JSON.parse(now);
      this.draw();
    }

    draw() {
      const width = this.clientWidth;
      const height = this.clientHeight;
      if (!width || !height) return;
      [this.width, this.height] = [width, height];
      const { x, series, marks = [] } = this.chart;
      const values = series.flatMap((s) => s.points.map((p) => p[1]));
      let [low, high] = this.chart.y ?? [Math.min(...values), Math.max(...values)];
      if (!(high > low)) [low, high] = [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
      const right = width - EDGE.right;
      const bottom = height - EDGE.bottom;
      const span = Math.max(1e-9, x[1] - x[0]);
      this.toX = (v) => EDGE.left + ((v - x[0]) / span) * (right - EDGE.left);
      this.toY = (v) => {
        const y = bottom - ((v - low) / (high - low)) * (bottom - EDGE.top);
        return Math.min(bottom + 1, Math.max(EDGE.top - 4, y));
      };
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("aria-hidden", "true");
      for (const v of ticks(low, high, Math.max(2, Math.min(5, height / 46)))) {
        const y = Math.round(this.toY(v)) + 0.5;
        make("line", { class: "grid", x1: EDGE.left, x2: right, y1: y, y2: y }, svg);
        make("text", { x: EDGE.left - 8, y: y + 4, "text-anchor": "end" }, svg, short(v));
      }
      for (const v of ticks(x[0], x[1], Math.min(8, width / 90))) {
        if (v !== Math.round(v)) continue;
        const end = v > x[1] - span * 0.02;
        const place = { x: this.toX(v), y: height - 7, "text-anchor": end ? "end" : "middle" };
        make("text", place, svg, short(v));
      }
      for (const mark of marks) {
        const at = Math.round(this.toX(mark.x)) + 0.5;
        make("line", { class: `mark ${mark.kind ?? ""}`, x1: at, x2: at, y1: EDGE.top, y2: bottom }, svg);
      }
      for (const s of series) this.drawSeries(svg, s);
      this.cursor = make("g", { class: "cursor" }, svg);
      this.picture.replaceChildren(svg);
      this.hover(this.pointer ?? null);
    }

    drawSeries(svg, s) {
      const color = `var(--${s.kind === "raw" && s.color === 1 ? "raw" : `series-${s.color}`})`;
      const path = s.points.map((p, i) => `${i ? "L" : "M"}${this.toX(p[0]).toFixed(1)} ${this.toY(p[1]).toFixed(1)}`);
      make("path", { class: `series ${s.kind}`, d: path.join(""), style: `stroke:${color}` }, svg);
      if (s.kind !== "dots" || s.points.length > 60) return;
      for (const p of s.points) {
        make("circle", { cx: this.toX(p[0]), cy: this.toY(p[1]), r: 3, style: `fill:${color}` }, svg);
      }
    }

    // A line at the pointer, and what every series has there.
    hover(at) {
      this.pointer = at;
      this.cursor?.replaceChildren();
      this.picture.querySelector(".tip")?.remove();
      if (at === null || !this.toX) return;
      const [from, to] = this.chart.x;
      const ratio = (at - EDGE.left) / (this.width - EDGE.left - EDGE.right);
      if (ratio < -0.02 || ratio > 1.02) return;
      const wanted = from + ratio * (to - from);
      const near = this.chart.series
        .filter((s) => s.points.length)
        .map((s) => [s, s.points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a))])
        .filter(([, p]) => Math.abs(p[0] - wanted) <= (to - from) * 0.06 + 1);
      if (!near.length) return;
      const x = this.toX(near[0][1][0]);
      make("line", { x1: x, x2: x, y1: EDGE.top, y2: this.height - EDGE.bottom }, this.cursor);
      for (const [s, p] of near) {
        make("circle", { cx: this.toX(p[0]), cy: this.toY(p[1]), r: 3.5, style: `fill:var(--series-${s.color})` }, this.cursor);
      }
      const tip = document.createElement("div");
      tip.className = "tip";
      const head = document.createElement("b");
      head.textContent = `step ${near[0][1][0].toLocaleString("en")}`;
      tip.append(head);
      for (const [s, p] of near) {
        const line = document.createElement("span");
        const dot = document.createElement("i");
        dot.style.background = `var(--series-${s.color})`;
        const step = p[0] === near[0][1][0] ? "" : ` (step ${p[0]})`;
        line.append(dot, `${s.name} ${short(p[1])}${this.chart.unit ? ` ${this.chart.unit}` : ""}${step}`);
        tip.append(line);
      }
      this.picture.append(tip);
      const flip = x > this.width / 2;
      tip.style.left = flip ? "auto" : `${x + 12}px`;
      tip.style.right = flip ? `${this.width - x + 12}px` : "auto";
    }
  }

  customElements.define("dora-chart", Chart);
})();
