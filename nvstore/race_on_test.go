//go:build race

package nvstore_test

// raceDetector multiplies memory and time.
const raceDetector = true
