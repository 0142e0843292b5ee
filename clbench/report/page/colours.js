// Palettes of both themes. Lines: Okabe and Ito's colours that keep a contrast on the ground; heat: OKLCH with even steps of lightness.
const PALETTES = {
  light: { ground: '#ffffff', ink: '#1b1f24', quiet: '#5b6470', grid: '#e4e7eb', line: '#c3c9d1', a: '#0072b2', b: '#d55e00', soft: '#9aa4b0', series: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b07800', '#56b4e9'], phases: ['#0072b2', '#56b4e9', '#a9c9de', '#e69f00', '#c9ced4'], low: [0.97, 0.02, 110], high: [0.36, 0.11, 262] },
  dark: { ground: '#14171b', ink: '#e8eaed', quiet: '#9aa4b0', grid: '#2a2f36', line: '#444b55', a: '#56b4e9', b: '#f0a030', soft: '#6b7580', series: ['#56b4e9', '#f0a030', '#2fc79a', '#e29bc4', '#f0e442', '#8ab4f8'], phases: ['#3d9bd4', '#86c9ef', '#2f5f7d', '#e69f00', '#5a626d'], low: [0.27, 0.03, 262], high: [0.9, 0.13, 110] },
};
let theme = 'light';
const palette = () => PALETTES[theme];

function oklch(l, c, h) {
  const a = c * Math.cos((h * Math.PI) / 180);
  const b = c * Math.sin((h * Math.PI) / 180);
  const [x, y, z] = [l + 0.3963377774 * a + 0.2158037573 * b, l - 0.1055613458 * a - 0.0638541728 * b, l - 0.0894841775 * a - 1.291485548 * b].map((v) => v ** 3);
  const linear = [4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z, -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z, -0.0041960863 * x - 0.7034186147 * y + 1.707614701 * z];
  return linear.map((v) => { const u = Math.min(1, Math.max(0, v)); return u <= 0.0031308 ? 12.92 * u : 1.055 * u ** (1 / 2.4) - 0.055; });
}
const hex = (rgb) => `#${rgb.map((v) => Math.round(255 * v).toString(16).padStart(2, '0')).join('')}`;
const luminance = (rgb) => { const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
// A share in 0..1 -> the colour of a cell, and the text colour that stands out more on it.
function heat(share, p) {
  const t = Math.min(1, Math.max(0, share));
  const mix = (k) => p.low[k] + t * (p.high[k] - p.low[k]);
  const rgb = oklch(mix(0), mix(1) + 0.06 * Math.sin(Math.PI * t), mix(2));
  const y = luminance(rgb);
  return { fill: hex(rgb), ink: 1.05 / (y + 0.05) > (y + 0.05) / 0.05 ? '#ffffff' : '#000000' };
}
// Places in an order (sets by experience) -> colours that keep a contrast on the ground.
const ordered = (share, p) => heat(p === PALETTES.light ? 0.34 + 0.66 * share : 0.4 + 0.6 * share, p).fill;
