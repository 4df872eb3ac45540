// Draws the figures of the report and keeps their colours those of the page: on a change of theme, and on paper.
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figure-data").textContent);
  const boxes = [...document.querySelectorAll("[data-figure]")];
  const settings = { displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false };
  const colour = (role) => getComputedStyle(document.documentElement).getPropertyValue("--" + role).trim();

  const themed = (spec, room, width) => {
    const copy = JSON.parse(JSON.stringify(spec));
    for (const trace of copy.data) {
      const own = colour(trace.meta);
      if (trace.type === "bar") {
        trace.marker.color = own;
        trace.textfont = { color: colour("ink"), size: 12 };
      } else if (trace.mode === "markers") {
        trace.marker.color = own;
        trace.marker.line.color = own;
        if (trace.error_x) trace.error_x.color = own;
      } else if (trace.mode === "text") {
        trace.textfont = { color: own, size: 12 };
      } else {
        trace.line.color = own;
        trace.fillcolor = own;
        if (trace.marker) trace.marker.color = own;
      }
    }
    const layout = copy.layout;
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("quiet") };
    layout.hoverlabel = { align: "left", bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } };
    for (const name of ["xaxis", "yaxis"]) {
      layout[name].gridcolor = colour("line");
      layout[name].zerolinecolor = colour("quiet");
      if (name === "yaxis" && layout[name].ticktext) layout[name].tickfont = { color: colour("ink"), size: 12 };
    }
    if (room < 420) layout.xaxis.nticks = 4;
    layout.height = spec.height;
    layout.autosize = !width;
    if (width) layout.width = width;
    return copy;
  };

  const draw = (width) => Promise.all(
    boxes.map((box) => {
      const fixed = width && (box.dataset.half ? width / 2 - 12 : width);
      const { data, layout } = themed(specs[box.dataset.figure], fixed || box.clientWidth, fixed);
      return Plotly.react(box, data, layout, settings);
    }),
  );

  draw().then(() => { document.documentElement.dataset.drawn = String(boxes.length); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  // Paper is light whatever the screen is. The class is needed because print styles do not apply yet when the event
  // fires; a printed column is about 640 CSS pixels wide.
  const paper = document.documentElement.classList;
  addEventListener("beforeprint", () => { paper.add("paper"); draw(640); });
  addEventListener("afterprint", () => { paper.remove("paper"); draw(); });
})();
