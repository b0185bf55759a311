/** What gains say of a map. */

/** The effective number of directions: exp of the entropy of their shares of the energy; 0 of a map that is zero. */
export function entropyRank(gains: number[]): number {
  const energies = gains.map((gain) => gain * gain);
  const total = energies.reduce((a, b) => a + b, 0);
  if (total === 0) return 0;
  return Math.exp(-energies.reduce((sum, e) => sum + (e > 0 ? (e / total) * Math.log(e / total) : 0), 0));
}
