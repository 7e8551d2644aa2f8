
// Edges in, a layered drawing's coordinates out: callers left of what they call. Knows nothing of the document.

const BOX = { width: 172, height: 44, row: 60, column: 220, widest: 440, margin: 16 };

/** Edges are {from, to}, by node key. Gives every node {key, layer, x, y}, and the size of it all. */
function layout(keys, edges, width) {
  const nodes = new Map(keys.map((key) => [key, { key, layer: 0, next: [], previous: [] }]));
  for (const [from, to] of acyclic(keys, edges)) {
    nodes.get(from).next.push(to);
    nodes.get(to).previous.push(from);
  }
  assignLayers(nodes);
  const layers = [];
  for (const node of nodes.values()) (layers[node.layer] ??= []).push(node);
  order(layers, nodes);
  return place(layers, nodes, width);
}

/** The edges without duplicates, loops and, reversed, whatever closes a circle. */
function acyclic(keys, edges) {
  const targets = new Map(keys.map((key) => [key, new Set()]));
  const callers = new Map(keys.map((key) => [key, 0]));
  for (const { from, to } of edges) {
    if (from === to || targets.get(from).has(to)) continue;
    targets.get(from).add(to);
    callers.set(to, callers.get(to) + 1);
  }
  const state = new Map();
  const result = [];
  const seen = new Set();
  const keep = (from, to) => {
    const id = JSON.stringify([from, to]);
    if (!seen.has(id)) { seen.add(id); result.push([from, to]); }
  };
  const roots = [...keys].sort((a, b) => callers.get(a) - callers.get(b));
  for (const root of roots) {
    if (state.has(root)) continue;
    // By hand, because a long chain must not exhaust the stack.
    const path = [[root, [...targets.get(root)]]];
    state.set(root, 'open');
    while (path.length) {
      const [node, left] = path[path.length - 1];
      const next = left.pop();
      if (next === undefined) { state.set(node, 'done'); path.pop(); continue; }
      if (state.get(next) === 'open') { keep(next, node); continue; }
      keep(node, next);
      if (!state.has(next)) { state.set(next, 'open'); path.push([next, [...targets.get(next)]]); }
    }
  }
  return result;
}

function assignLayers(nodes) {
  const waiting = new Map([...nodes.values()].map((node) => [node.key, node.previous.length]));
  const queue = [...nodes.values()].filter((node) => !node.previous.length);
  for (const node of queue) {
    for (const key of node.next) {
      const next = nodes.get(key);
      next.layer = Math.max(next.layer, node.layer + 1);
      waiting.set(key, waiting.get(key) - 1);
      if (waiting.get(key) === 0) queue.push(next);
    }
  }
  // A caller stands just left of the first it calls.
  for (const node of nodes.values()) {
    if (!node.previous.length && node.next.length) {
      node.layer = Math.min(...node.next.map((key) => nodes.get(key).layer)) - 1;
    }
  }
}

/** Sorts each layer so that neighbours stand near each other: fewer crossings. */
function order(layers, nodes) {
  const rank = (layer) => layer.forEach((node, at) => { node.rank = (at + 0.5) / layer.length; });
  layers.forEach((layer) => { layer.sort((a, b) => (a.key < b.key ? -1 : 1)); rank(layer); });
  const sweep = (layer, side) => {
    for (const node of layer) {
      const ranks = node[side].map((key) => nodes.get(key).rank);
      node.pull = ranks.length ? ranks.reduce((a, b) => a + b, 0) / ranks.length : node.rank;
    }
    layer.sort((a, b) => a.pull - b.pull);
    rank(layer);
  };
  for (let round = 0; round < 6; round += 1) {
    layers.forEach((layer) => sweep(layer, 'previous'));
    [...layers].reverse().forEach((layer) => sweep(layer, 'next'));
  }
}

function place(layers, nodes, width) {
  const tallest = Math.max(1, ...layers.map((layer) => layer.length));
  const room = (width - 2 * BOX.margin - BOX.width) / Math.max(1, layers.length - 1);
  const step = Math.min(BOX.widest, Math.max(BOX.column, room));
  const height = tallest * BOX.row + 2 * BOX.margin;
  layers.forEach((layer, at) => layer.forEach((node, row) => {
    // Few in a layer stand further apart, up to twice as far.
    const gap = Math.min((tallest * BOX.row) / layer.length, BOX.row * 2);
    node.x = BOX.margin + at * step;
    node.y = height / 2 + (row - (layer.length - 1) / 2) * gap;
  }));
  return { nodes, width: 2 * BOX.margin + BOX.width + (layers.length - 1) * step, height };
}
