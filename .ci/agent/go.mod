module agentbuild

go 1.26

replace drjosh.dev/zzglob => ./zzglob
