//go:build !race

package nvstore_test

const raceDetector = false
