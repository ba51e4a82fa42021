package formats_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd/formats"
)

// Every spec in a format's folder of fixtures, NAME.FORMAT.jsonc, packs without
// a warning into an image that is good and that no other format detects.
func TestSamples(t *testing.T) {
	specs, err := filepath.Glob(fixtures + "*/*.jsonc")
	require.NoError(t, err)
	require.NotEmpty(t, specs)
	for _, path := range specs {
		t.Run(filepath.Base(path), func(t *testing.T) {
			f, err := formats.OfSpec(read(t, path))
			require.NoError(t, err)
			require.Equal(t, f.Name(), strings.Split(filepath.Base(path), ".")[1])
			image, warnings, err := f.Pack(read(t, path))
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Empty(t, f.Verify(image))
			for _, other := range formats.All() {
				if other.Detect(image) {
					require.Equal(t, f.Name(), other.Name())
				}
			}
		})
	}
}

// No image in a format's folder of fixtures, good or bad, is detected as of
// another format.
func TestImagesAreNoOthers(t *testing.T) {
	paths, err := filepath.Glob(fixtures + "*/*")
	require.NoError(t, err)
	n := 0
	for _, path := range paths {
		if ext := filepath.Ext(path); ext == ".md" || ext == ".jsonc" {
			continue
		}
		image := read(t, path)
		for _, f := range formats.All() {
			if f.Detect(image) {
				require.Equal(t, filepath.Base(filepath.Dir(path)), f.Name(), path)
				n++
			}
		}
	}
	require.Greater(t, n, 30)
}
