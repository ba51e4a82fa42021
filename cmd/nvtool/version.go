package main

import (
	"context"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// release is set by the linker for a release: -X main.release=v1.2.3.
var release string

func version() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				v += "-" + s.Value[:12]
			}
		}
	}
	return v
}

func (a *app) versionCmd() *cobra.Command {
	return a.verb("version", "Print nvtool's version", func(_ context.Context, args []string) error {
		if len(args) > 0 {
			return usagef("version takes no arguments")
		}
		if a.json {
			return a.printJSON(struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				OS      string `json:"os"`
				Arch    string `json:"arch"`
				Format  int    `json:"store_format"`
			}{version(), runtime.Version(), runtime.GOOS, runtime.GOARCH, 1})
		}
		a.quiet = false
		a.sayf("nvtool %s (%s %s/%s)", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return nil
	})
}
